from dualout import processes


def test_variables_that_are_empty_are_of_a_process_alone(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    assert (processes.count(), processes.rank(), processes.local_rank()) == (1, 0, None)
