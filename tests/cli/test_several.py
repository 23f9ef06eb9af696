"""Mistakes in commands that several processes share: one message, whoever comes to it first."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

import dualout.cli.main as module
from dualout.cli import _processes
from dualout.cli.main import main
from processes import two


@pytest.fixture
def shared(monkeypatch):
    """Torchrun's surroundings: its store, which outlives the processes that it starts."""
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5)
    )
    for name, value in {
        "WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return store


def test_what_all_come_to_is_told_once_and_what_one_does_by_it(shared, monkeypatch, capsys):
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert main(["trian"]) == 2
    assert capsys.readouterr().err.count("unknown command 'trian'") == 1
    assert main(["trial"]) == 2
    assert "unknown command 'trial'" in capsys.readouterr().err
    # torchrun starts them once more
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(["trian"]) == 2
    assert "unknown command 'trian'" in capsys.readouterr().err


def test_where_nobody_can_be_asked_all_tell_it(shared, monkeypatch):
    assert [_processes.tells("a"), _processes.tells("a")] == [True, False]
    monkeypatch.setenv("MASTER_PORT", "no number")
    assert _processes.tells("a")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert _processes.tells("a")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert _processes.tells("a")


@pytest.mark.parametrize(
    "says",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:19841",
        "NCCL error: ncclRemoteError: A call failed possibly due to a network error or a remote process exiting "
        "prematurely.",
    ],
)
def test_one_whose_others_have_ended_says_so(says, monkeypatch, capsys):
    def run(arguments):
        raise RuntimeError(says)

    monkeypatch.setitem(module.sys.modules, "dualout.cli.trial", SimpleNamespace(run=run))
    monkeypatch.setattr(module, "commands", lambda: {"trial": "A trial."})
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["trial"]) == 2
    assert capsys.readouterr().err == "dualout trial: another of its processes has ended, and this one cannot go on\n"
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RuntimeError):
        main(["trial"])


@pytest.mark.parametrize("command", ["demo", "compare", "analyze", "calibrate", "upgrade", "export"])
def test_what_is_not_shared_is_refused_before_it_begins(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    assert main([command, "run"]) == 2
    assert "it runs as one process, and WORLD_SIZE is 2: start it without torchrun" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_alone_says_that_it_was_stopped(rank, monkeypatch, capsys):
    def run(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(module.sys.modules, "dualout.cli.trial", SimpleNamespace(run=run))
    monkeypatch.setattr(module, "commands", lambda: {"trial": "A trial."})
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    assert main(["trial"]) == 130
    assert ("stopped" in capsys.readouterr().err) == (rank == 0)


@pytest.mark.slow
def test_a_mistake_in_what_two_processes_score_is_told_once_without_a_traceback(tmp_path):
    command = ["evaluate", str(tmp_path / "nowhere"), "--device", "cpu"]
    done = two(*command)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    done = two(*command, torchrun=True)
    assert done.stderr.count("dualout evaluate: no checkpoint directory at") == 1
    # its own, above the table of what failed
    assert done.stderr.count("Traceback") == 1
    assert "[rank" not in done.stderr
