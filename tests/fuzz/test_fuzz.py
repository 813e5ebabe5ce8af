"""Some damaged artifacts of every kind; `python -m tests.fuzz --cases 10000` is the full run."""

import json

import pytest

from tests.effort import NIGHTLY, SEED
from tests.fuzz import cases, runner, values

CASES = 3000 if NIGHTLY else 60


def test_no_damage_crashes_hangs_or_passes_for_sound(artifacts):
    report = runner.run_here(artifacts, range(CASES), seed=SEED)
    found = json.dumps(report.to_json(shown=5), indent=2)
    assert not report.failures, f"SPP_FX_SEED={SEED} draws these again: {found}"


@pytest.mark.slow
def test_a_process_of_its_own_finds_the_same(artifacts):
    numbers = range(len(artifacts))
    report = runner.run(artifacts, numbers, seed=SEED, jobs=1)
    assert report.outcomes == runner.run_here(artifacts, numbers, seed=SEED).outcomes


def test_a_case_is_the_same_whenever_it_is_made(artifacts, tmp_path):
    seed = artifacts["sharded"]

    def made(name: str) -> tuple[list[str], dict[str, bytes]]:
        (tmp_path / name).mkdir()
        case = cases.make(cases.rng_of(7, 1), 1, seed, tmp_path / name)
        files = {p.name: p.read_bytes() for p in case.seed.root.rglob("*.safetensors") if p.is_file()}
        return case.done, files

    assert made("first") == made("second")


def test_the_metadata_of_a_packed_tensor_is_no_value():
    header = {"w.packed": {"shape": [64, 36]}}
    assert [values._is_value("w.packed", at, header) for at in (0, 2047, 2048, 2303)] == [
        True,
        True,
        False,
        False,
    ]
    assert values._is_value(
        "w.packed", 2303, header | {"w.meta": {}}
    )  # CUTLASS has it in a tensor of its own


def test_the_oracle_sees_a_verify_that_believes_everything(artifacts, monkeypatch):
    from spp_fx.verbs.verify import verify
    from tests.fuzz import oracle

    sound = verify(artifacts["lone"].path)
    monkeypatch.setattr(oracle, "verify", lambda *_, **__: sound)
    lone = {"lone": artifacts["lone"]}
    assert any(oracle.run_case(lone, 0, number).outcome == oracle.FALSE_OK for number in range(30))


@pytest.mark.parametrize("option", ["pattern", "against"])
def test_the_oracle_asks_a_verify_without_a_lock(artifacts, monkeypatch, option):
    from spp_fx.verbs.verify import verify
    from tests.fuzz import oracle

    sound = verify(artifacts["lone"].path)
    monkeypatch.setattr(oracle, "verify", lambda path, **o: sound if option in o else verify(path, **o))
    lone = {"lone": artifacts["lone"]}
    found = (oracle.run_case(lone, 0, number) for number in range(40))
    assert any(each.outcome == oracle.FALSE_OK and option in each.detail for each in found)


def test_the_oracle_sees_an_error_that_is_not_the_projects(artifacts, monkeypatch):
    from tests.fuzz import oracle

    def broken(*_: object, **__: object) -> None:
        raise KeyError("w")

    monkeypatch.setattr(oracle, "verify", broken)
    found = oracle.run_case({"lone": artifacts["lone"]}, 0, 0)
    assert (found.outcome, "KeyError" in found.detail) == (oracle.CRASH, True)
