"""A small sparse model folder with a tokenizer, and an adapter over it, for tests that damage them."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from spp_fx.verbs.demo import train_tokenizer
from tests.command import must, randomize, save_tokenizer
from tests.families import make_model
from tests.worlds import assert_untouched, made_once

SENTENCE = "the cat sat on a mat and saw one small red bird in that old tree while it was warm"


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    generator = random.Random(0)
    path.write_text("\n".join(" ".join(generator.choices(SENTENCE.split(), k=12)) + "." for _ in range(400)))
    return path


def save_with_tokenizer(
    folder: Path, text: Path, family: str = "llama", *, one_layer: bool = False, **kwargs: object
) -> None:
    """A random model whose vocabulary is large enough for a byte-level tokenizer of the text."""
    model = make_model(family, one_layer=one_layer)
    tokenizer = train_tokenizer(text)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder, **kwargs)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory, text_file) -> Iterator[Path]:
    """dense/, sparse/ (2:4), half/ (50%), adapter/ over sparse/; only to be read."""

    def make(folder: Path) -> None:
        save_with_tokenizer(folder / "dense", text_file, max_shard_size="40KB")
        must("prune", folder / "dense", "-o", folder / "sparse", "-q")
        must("prune", folder / "dense", "-o", folder / "half", "--pattern", "50%", "-q")
        must("inject", folder / "sparse", "-o", folder / "adapter", "--rank", 4, "-q")

    folder = made_once(tmp_path_factory, "pristine", make)
    yield folder
    assert_untouched(folder)


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Iterator[Path]:
    """Small folders: dense, shards (dense), sparse, sharded (both 2:4), half (50%), adapter, merged, packed.

    Only to be read.
    """

    def make(root: Path) -> None:
        model = make_model("llama")
        _fill(root, model)
        must("prune", root / "dense", "-o", root / "half", "--pattern", "50%")
        model.save_pretrained(root / "shards", max_shard_size="40KB")
        must("prune", root / "shards", "-o", root / "sharded")

    folder = made_once(tmp_path_factory, "world", make)
    yield folder
    assert_untouched(folder)


@pytest.fixture(scope="session")
def made_shallow(tmp_path_factory) -> Iterator[Path]:
    """Of one layer, for tests that load or train it many times: dense, sparse, adapter, merged, packed.

    Only to be read.
    """
    folder = made_once(
        tmp_path_factory, "shallow", lambda root: _fill(root, make_model("llama", one_layer=True))
    )
    yield folder
    assert_untouched(folder)


def _fill(root: Path, model: PreTrainedModel) -> None:
    model.save_pretrained(root / "dense")
    save_tokenizer(root / "dense")
    (root / "text.txt").write_text("\n".join("a b c d e f g h i j" for _ in range(60)))
    must("prune", root / "dense", "-o", root / "sparse")
    must("inject", root / "sparse", "-o", root / "adapter", "--rank", 4)
    randomize(root / "adapter")
    must("merge", root / "adapter", "-o", root / "merged")
    must("export", root / "merged", "-o", root / "packed", "--format", "cusparselt")


@pytest.fixture
def world(made, tmp_path):
    """A copy of the small folders that a test may damage; its adapter's base is the copy."""
    return _copy(made, tmp_path / "world")


@pytest.fixture
def shallow(made_shallow, tmp_path):
    """A copy of the folders of one layer that a test may damage; its adapter's base is the copy."""
    return _copy(made_shallow, tmp_path / "shallow")


def _copy(made: Path, root: Path) -> Path:
    shutil.copytree(made, root)
    config = root / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(made), str(root)))
    return root
