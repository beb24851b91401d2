from __future__ import annotations

import torch

from vitkernels.__main__ import main
from vitkernels.merge_demo import paint


def test_the_picture_is_written(tmp_path, capsys) -> None:
    from PIL import Image

    Image.effect_noise((90, 120), 60).convert("RGB").save(tmp_path / "noise.png")
    output = tmp_path / "out" / "merged.png"
    assert main(["merge", "--image", str(tmp_path / "noise.png"), "--output", str(output)]) == 0
    assert Image.open(output).size[0] > 500
    assert "token merging, r = [13, 13" in capsys.readouterr().out


def test_groups_in_their_mean_color() -> None:
    photo = torch.zeros(3, 4, 4)
    photo[:, :2, 2:] = 1
    painted = paint(photo, torch.tensor([[0, 0], [0, 1]]))
    torch.testing.assert_close(painted[:, 0, 0], torch.full((3,), 1 / 3))
    assert (painted[:, 2:, 2] == 1).all(), "an edge"
    assert (painted[:, 3, 3] == 0).all()


def test_bad_input_is_one_line(tmp_path, capsys) -> None:
    assert main(["merge", "--image", str(tmp_path / "none.png")]) == 2
    assert "expected a readable image file" in capsys.readouterr().err
    assert main(["merge", "--output", "merged.foo"]) == 2
    assert "output: expected a file of " in capsys.readouterr().err
