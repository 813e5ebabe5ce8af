"""eval: the definition of perplexity, several models in one table, adapters and exports without a merge."""

import gc
import math
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import spp_fx
from spp_fx.verbs import evaluate as module
from spp_fx.verbs.evaluate import evaluate
from tests.command import command, must, one_line, randomize
from tests.verbs.conftest import save_with_tokenizer


def plain_perplexity(folder: Path, text: Path, length: int, stride: int) -> tuple[float, int]:
    """One window at a time through transformers' own model; labels of what was predicted before are -100."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_text())["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    ids = torch.tensor(ids)
    total, count, end = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        window = ids[begin : begin + length]
        labels = window.clone()
        labels[: max(1, end - begin)] = -100  # the first token of a window has nothing before it
        end = begin + len(window)
        predicted = int((labels != -100).sum())
        if predicted:
            with torch.no_grad():
                total += predicted * float(model(window[None], labels=labels[None]).loss)
            count += predicted
        if end == len(ids):
            break
    return math.exp(total / count), count


@pytest.fixture(scope="module")
def text(made_shallow, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((made_shallow / "text.txt").read_text()[:300])
    return path


@pytest.mark.parametrize(("length", "stride"), [(32, 8), (32, 31), (33, 1), (16, 16), (64, 48)])
def test_overlapping_windows_predict_every_token_once(made_shallow, text, length, stride):
    measured = evaluate(made_shallow / "sparse", text, seq_len=length, stride=stride)
    expected, count = plain_perplexity(made_shallow / "sparse", text, length, stride)
    assert measured.result.tokens == count
    assert measured.result.perplexity == pytest.approx(expected, rel=1e-5)  # float32 sums in another order
    if stride < length:
        whole = AutoTokenizer.from_pretrained(made_shallow / "sparse")(text.read_text())["input_ids"]
        assert count in (len(whole) - 1, len(whole))  # all but the first; an end may be added


def test_a_stride_of_whole_windows_is_the_fixed_measure(made_shallow, text):
    fixed, sliding = (
        evaluate(made_shallow / "sparse", text, seq_len=32, stride=stride) for stride in (None, 32)
    )
    assert (fixed.result, fixed.text) == (sliding.result, sliding.text)


def test_one_window_that_holds_the_text_is_the_same_with_any_stride(made_shallow, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a b c d e")
    assert (
        evaluate(made_shallow / "sparse", short, seq_len=32).result
        == evaluate(made_shallow / "sparse", short, seq_len=32, stride=4).result
    )
    one = must("eval", made_shallow / "sparse", "--data", short, "--seq-len", 32)
    assert "(1 window of 32)" in one.out
    assert "the perplexity of 1 window of text is rough (5 predicted tokens)" in one.err


def test_several_models_are_one_table_and_one_json(made_shallow, text):
    names = [made_shallow / name for name in ("dense", "adapter", "merged", "packed")]
    table = must("eval", *names[:2], "--data", text, "--seq-len", 32, "-q").out.splitlines()
    assert table[0].split() == ["model", "perplexity", "tokens"]
    assert [line.split()[0] for line in table[1:]] == [str(name) for name in names[:2]]
    dense, adapter, merged, packed = must(
        "eval", *names, "--data", text, "--seq-len", 32, "--json", "-q"
    ).json["models"]
    alone = must("eval", made_shallow / "dense", "--data", text, "--seq-len", 32, "--json", "-q").json
    drop = {"seconds", "model"}
    same = [
        {key: each[key] for key in each.keys() - drop} for each in (alone, dense, adapter, merged, packed)
    ]
    assert same[0] == same[1]
    assert same[2] == same[3] == same[4]  # to the bit: what merge writes, and what export keeps
    assert dense["perplexity"] != merged["perplexity"]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("gpt2", "bfloat16"),
        pytest.param("gpt2", "float32", marks=pytest.mark.slow),
        pytest.param("mixtral", "bfloat16", marks=pytest.mark.slow),
        pytest.param("mixtral", "float32", marks=pytest.mark.slow),
    ],
)
def test_an_adapter_is_measured_as_what_merge_writes(family, dtype, text_file, tmp_path):
    save_with_tokenizer(tmp_path / "plain", text_file, family, one_layer=True)
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text()[:1500])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "dense")
    must("prune", tmp_path / "dense", "-o", tmp_path / "sparse", "-q")
    must("inject", tmp_path / "sparse", "-o", tmp_path / "adapter", "--rank", 4, "--dropout", 0.5, "-q")
    randomize(tmp_path / "adapter")
    must("merge", tmp_path / "adapter", "-o", tmp_path / "merged", "-q")
    sparse, adapter, merged = (
        evaluate(tmp_path / name, text, seq_len=64).result for name in ("sparse", "adapter", "merged")
    )
    assert adapter == merged
    assert adapter.loss != sparse.loss


def test_a_model_is_freed_before_the_next_is_loaded(made_shallow, text, monkeypatch):
    kept: list[weakref.ref[torch.nn.Module]] = []
    load = module.load_evaluated

    def loading(*args: object, **kwargs: object) -> object:
        gc.disable()  # evaluate must collect by itself
        assert not [each for each in kept if each() is not None]
        model, home = load(*args, **kwargs)  # type: ignore[arg-type]
        kept.append(weakref.ref(model))
        return model, home

    monkeypatch.setattr(module, "load_evaluated", loading)
    try:
        must(
            "eval",
            made_shallow / "dense",
            made_shallow / "adapter",
            made_shallow / "merged",
            "--data",
            text,
            "--seq-len",
            32,
            "-q",
        )
    finally:
        gc.enable()
    assert len(kept) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--data"),
        (["--data", "text.txt", "--stride", 0], "--stride must be at least 1"),
        (["--data", "text.txt", "--seq-len", 16, "--stride", 17], "--stride must be 1 to 16"),
        (["--data", "text.txt", "--limit", 3], "--tasks"),
        (["--tasks", "boolq", "--stride", 3], "--data"),
        (["--data", "text.txt", "--base", "dense"], "no MODEL is an adapter"),
        (["--data", "text.txt", "--device", "nowhere"], "--device nowhere"),
        (["--tasks", "boolq", "--batch-size", "0"], "--batch-size must be a number or auto"),
    ],
)
def test_wrong_options_are_refused_in_one_line(made_shallow, monkeypatch, words, said):
    monkeypatch.chdir(made_shallow)
    result = command("eval", "sparse", *words, "-q")
    assert result.code == 2
    assert said in one_line(result.err)


def test_the_last_model_is_checked_before_the_first_is_measured(made_shallow, text, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "load_evaluated", lambda *args: pytest.fail("a model was loaded"))
    result = command("eval", made_shallow / "sparse", tmp_path / "none", "--data", text, "-q")
    assert result.code == 2
    assert "none" in one_line(result.err)


def test_the_function_measures_what_the_command_does(made_shallow, text):
    found = spp_fx.evaluate(made_shallow / "sparse", text, seq_len=32, stride=16)
    said = must(
        "eval", made_shallow / "sparse", "--data", text, "--seq-len", 32, "--stride", 16, "--json", "-q"
    ).json
    assert found.to_json() | {"seconds": 0} == said | {"seconds": 0}
    with pytest.raises(spp_fx.SppFxError, match="--data"):
        spp_fx.evaluate(made_shallow / "sparse")
