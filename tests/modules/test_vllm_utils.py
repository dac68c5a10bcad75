"""Do the helpers that ChatLearn's policies import do what their names say?"""

import pytest

from chatlearn_vllm.utils.vllm_utils import print_rank_0


@pytest.mark.parametrize(("rank", "printed"), [("0", "built\n"), ("1", "")])
def test_one_rank_prints(monkeypatch, capsys, rank, printed) -> None:
    monkeypatch.setenv("RANK", rank)
    print_rank_0("built")
    assert capsys.readouterr().out == printed
