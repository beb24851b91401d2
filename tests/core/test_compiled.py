"""Every operator under torch.compile and torch.export."""

from __future__ import annotations

import torch
from operator_calls import each_device, each_first_sample, each_sample, gradients, outputs_of

import vitkernels
from vitkernels.core import backends


@each_sample
@each_device
def test_compile_is_one_dynamic_graph(sample, device):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    def run(tensors):
        return sample(tensors)

    compiled = torch.compile(run, backend=count, fullgraph=True, dynamic=True)
    # The first batch equals no other size of a sample: Dynamo takes equal sizes for one symbol.
    for batch in (6, 2, 11):
        tensors = sample.tensors(device=device, batch=batch)
        for got, want in zip(outputs_of(compiled(tensors)), outputs_of(sample(tensors)), strict=True):
            assert torch.equal(got, want)
    assert len(graphs) == 1


@each_first_sample
@each_device
def test_compile_trains(sample, device):
    torch._dynamo.reset()
    eager = sample.tensors(device=device, requires_grad=True)
    seeds = [torch.randn_like(o) for o in outputs_of(sample(eager))]
    _, want = gradients(sample, eager, seeds)

    compiled = torch.compile(lambda t: sample(t), backend="aot_eager", fullgraph=True, dynamic=True)
    outputs = outputs_of(compiled(eager))
    got = torch.autograd.grad(outputs, list(eager.values()), seeds)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@each_first_sample
def test_override_changes_the_compiled_graph(sample):
    torch._dynamo.reset()
    backends._choice.__dict__.pop("forced", None)  # a thread's first scope once changed nothing
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(lambda t: sample(t), backend=keep, fullgraph=True)
    tensors = sample.tensors()
    compiled(tensors)
    with vitkernels.backend("reference"):
        compiled(tensors)
    assert len(graphs) == 2
    assert f"vitkernels.{sample.op}" in graphs[0]
    assert f"vitkernels.{sample.op}" not in graphs[1]


@each_first_sample
def test_export_takes_the_reference(sample):
    class Module(torch.nn.Module):
        def forward(self, **tensors):
            return sample(tensors)

    tensors = sample.tensors()
    program = torch.export.export(Module(), (), tensors)
    assert "vitkernels" not in program.graph_module.code
    torch.testing.assert_close(
        outputs_of(program.module()(**tensors))[0], outputs_of(sample(tensors))[0], atol=1e-5, rtol=1e-5
    )
