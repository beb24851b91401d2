"""One module per operator, each with a ``CASE`` (see ``vitkernels.bench.case``)."""
