import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spp_fx.errors import FormatError, MaskError, UsageError
from spp_fx.sparsity.lock import Lock, compare, compare_masks, load_lock, make_entry
from spp_fx.sparsity.mask import PackedMask
from spp_fx.sparsity.pattern import parse_pattern

seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(1, 30), st.integers(1, 70)) | st.tuples(
    st.integers(1, 4), st.integers(1, 9), st.integers(1, 40)
)


def random_mask(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < 0.5


def entry_of(ones: np.ndarray, name: str = "w", pattern: str = "50%", **options):
    return make_entry(name, "linear", PackedMask.from_bool(ones), parse_pattern(pattern), **options)


def flipped(ones: np.ndarray, indices) -> PackedMask:
    changed = ones.reshape(-1).copy()
    changed[indices] ^= True
    return PackedMask.from_bool(changed.reshape(ones.shape))


# --- comparing


@given(data=st.data(), seed=seeds, shape=shapes)
def test_a_single_flip_is_named(data, seed, shape):
    ones = random_mask(seed, shape)
    index = data.draw(st.integers(0, ones.size - 1))
    found = compare(entry_of(ones), flipped(ones, [index]))
    position = [divmod(index, shape[-1])]
    assert not found.equal
    was_one = bool(ones.reshape(-1)[index])
    assert (found.first_lost, found.first_new) == (([], position) if was_one else (position, []))
    assert (found.lost_zeros, found.new_zeros) == ((0, 1) if was_one else (1, 0))


@given(data=st.data(), seed=seeds, rows=st.integers(1, 40), columns=st.integers(1, 70))
def test_one_flip_in_each_of_several_buckets_is_named(data, seed, rows, columns):
    ones = random_mask(seed, (rows, columns))
    chosen = data.draw(st.lists(st.integers(0, rows - 1), unique_by=lambda row: row % 8, min_size=1))
    flips = sorted((row, data.draw(st.integers(0, columns - 1))) for row in chosen)
    found = compare(entry_of(ones), flipped(ones, [row * columns + column for row, column in flips]))
    assert sorted(found.first_lost + found.first_new) == flips
    assert (found.lost_zeros, found.new_zeros) == (len(found.first_lost), len(found.first_new))
    assert all(not ones[position] for position in found.first_lost)
    assert all(ones[position] for position in found.first_new)


@given(data=st.data(), seed=seeds, shape=shapes)
def test_flips_are_named_truly_or_not_at_all(data, seed, shape):
    ones = random_mask(seed, shape)
    flips = data.draw(st.lists(st.integers(0, ones.size - 1), unique=True, max_size=6))
    now = flipped(ones, flips)
    found = compare(entry_of(ones), now)
    assert found.equal == (not flips)
    if found.lost_zeros is None:
        assert found.reason
        assert (found.new_zeros, found.first_lost, found.first_new) == (None, [], [])
    else:
        assert found == compare_masks(PackedMask.from_bool(ones), now)


def test_two_flips_in_one_bucket_are_not_guessed():
    ones = random_mask(0, (8, 64))
    found = compare(entry_of(ones), flipped(ones, [3, 40]))
    assert (found.equal, found.lost_zeros, found.new_zeros) == (False, None, None)
    assert "too many positions" in found.reason


def test_a_locator_that_lies_proves_nothing():
    ones = random_mask(0, (8, 64))
    entry = entry_of(ones).model_copy(update={"locator": "0" * 15 + "7" + "f" * 112})
    found = compare(entry, flipped(ones, [3]))
    assert (found.equal, found.lost_zeros, found.new_zeros) == (False, None, None)


def test_another_shape_is_said_not_searched():
    ones = random_mask(0, (8, 64))
    found = compare(entry_of(ones), PackedMask.from_bool(ones.reshape(16, 32)))
    assert (found.equal, found.lost_zeros, found.new_zeros) == (False, None, None)
    assert found.reason == "shape (16, 32), the lock has shape (8, 64)"


@given(seed=seeds, shape=shapes, limit=st.integers(0, 9))
def test_two_masks_are_compared_exactly(seed, shape, limit):
    then, now = random_mask(seed, shape), random_mask(seed + 1, shape)
    found = compare_masks(PackedMask.from_bool(then), PackedMask.from_bool(now), limit)
    columns = shape[-1]
    lost = [tuple(p) for p in np.argwhere((~then & now).reshape(-1, columns)).tolist()]
    new = [tuple(p) for p in np.argwhere((then & ~now).reshape(-1, columns)).tolist()]
    assert (found.lost_zeros, found.new_zeros) == (len(lost), len(new))
    assert (found.first_lost, found.first_new) == (lost[:limit], new[:limit])
    assert found.equal == np.array_equal(then, now)


def test_masks_of_different_shapes_are_not_compared():
    with pytest.raises(MaskError, match="cannot be compared"):
        compare_masks(*(PackedMask.from_bool(random_mask(0, shape)) for shape in [(2, 4), (4, 2)]))


# --- the file


def test_a_lock_is_written_one_site_a_line_sorted_and_stable():
    entries = [
        entry_of(random_mask(1, (2, 4)), "b.weight"),
        entry_of(random_mask(2, (2, 2, 4)), 'a."weight"\u2028', transposed=True),
    ]
    text = Lock.of(entries).dumps()
    assert text == Lock.of(reversed(entries)).dumps()
    lines = text.splitlines()
    assert lines[:4][:3] == ["{", '  "format_version": 2,', '  "pattern": "50%",']
    assert lines[4].startswith('    {"name": "a.\\"weight\\"\\u2028", "kind": "linear", "shape": [2, 2, 4], ')
    assert lines[4].endswith(', "transposed": true},')
    assert "transposed" not in lines[5]
    assert lines[6:] == ["  ]", "}"]
    assert text.endswith("}\n")
    assert list(json.loads(text)) == ["format_version", "pattern", "sites"]


@given(st.dictionaries(st.text(min_size=1, max_size=20).filter(lambda t: t.isprintable()), seeds, max_size=4))
def test_what_is_written_is_read_back(named):
    lock = Lock.of(entry_of(random_mask(seed, (3, 8)), name, "2:4") for name, seed in named.items())
    assert Lock.loads(lock.dumps()) == lock
    assert lock.pattern == ("2:4" if named else None)


def test_a_lock_of_different_patterns_has_none_of_its_own():
    ones = random_mask(0, (2, 8))
    dense = make_entry("c", "linear", PackedMask.from_bool(ones), None)
    lock = Lock.of([entry_of(ones, "a", "2:4"), entry_of(ones, "b", "4:8"), dense])
    assert lock.pattern is None
    assert Lock.loads(lock.dumps()) == lock
    assert lock.by_name()["b"].parsed_pattern() == parse_pattern("4:8")
    assert lock.by_name()["c"] == dense
    assert dense.parsed_pattern() is None
    assert "d" not in lock.by_name()


def test_a_name_given_twice_is_refused():
    with pytest.raises(FormatError, match="'w' appears twice"):
        Lock.of([entry_of(random_mask(0, (2, 4)))] * 2)


def test_an_unsorted_lock_is_read(tmp_path):
    document = json.loads(Lock.of(entry_of(random_mask(0, (2, 4)), name) for name in "abc").dumps())
    document["sites"].reverse()
    path = tmp_path / "sparsity.lock.json"
    path.write_text(json.dumps(document))
    assert [site.name for site in load_lock(path).sites] == ["c", "b", "a"]


def spoiled(**changes) -> str:
    site = {**json.loads(entry_of(random_mask(0, (2, 4)), pattern="2:4").line()), **changes}
    return json.dumps({"format_version": 2, "pattern": site["pattern"], "sites": [site]})


good = spoiled()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "not a valid lock.*spp-fx lock MODEL"),
        (good[:-3], "not valid JSON"),
        ("[]", "expected a JSON object.*spp-fx lock MODEL"),
        ("{}", "format_version"),
        ("\xff", "not valid JSON"),
        ("[" * 100_000, "nested too deep"),
        (good.replace('"w"', '"w", "x": ' + "[" * 100_000), "nested too deep"),
        (good.replace('"format_version": 2', '"format_version": 3'), "version 3 is unknown"),
        (
            good.replace('"format_version": 2', '"format_version": 1'),
            "version 1 is no longer read.*lock MODEL --force",
        ),
        (good.replace('"format_version": 2', '"format_version": true'), "format_version"),
        (good.replace('"format_version": 2, ', ""), "format_version"),
        (good.replace('"format_version": 2', '"format_version": 2, "extra": 1'), "extra"),
        (good.replace('"name": "w"', '"name": "w", "name": "v"'), "twice"),
        (good.replace('"pattern": "2:4", "sites"', '"pattern": "4:8", "sites"'), "its sites say '2:4'"),
        (good.replace('"pattern": "2:4", "sites"', '"pattern": null, "sites"'), "its sites say '2:4'"),
        (spoiled(nnz=-1), r"sites\[0\].nnz"),
        (spoiled(nnz=9), "9 non-zeros in a weight of 8"),
        (spoiled(nnz=1.0), "nnz"),
        (spoiled(nnz="1"), "nnz"),
        (good.replace('"nnz": ', '"nnz": ' + "9" * 5000), "digits"),
        (spoiled(shape=[-2, 4]), "shape"),
        (spoiled(shape=[8]), "shape"),
        (spoiled(shape=[1, 1, 2, 4]), "shape"),
        (spoiled(shape=[2**40, 2**40]), "more than 2\\*\\*60"),
        (spoiled(shape=[2**80, 4]), "shape"),
        (spoiled(shape=[1] * 100_000), "shape"),
        (spoiled(mask="0" * 63), "mask"),
        (spoiled(mask="G" * 64), "mask"),
        (spoiled(mask="0" * 64 + "\n"), "mask"),
        (spoiled(locator="0" * 127), "locator"),
        (spoiled(locator="0x" + "0" * 126), "locator"),
        (spoiled(name=""), "name"),
        (spoiled(name="a\n::error::b"), "name"),
        (spoiled(name="\ud800"), "surrogate|escape|unicode"),
        (spoiled(kind="Linear Layer"), "kind"),
        (spoiled(pattern="4:2"), "N must be smaller"),
        (spoiled(pattern="02:4"), "is written '2:4'"),
        (spoiled(transposed="yes"), "transposed"),
    ],
)
def test_an_invalid_lock_is_an_error_that_names_the_fault(tmp_path, text, fault):
    path = tmp_path / "bad.lock.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=rf"(?s)bad\.lock\.json: .*({fault})") as refusal:
        load_lock(path)
    assert len(str(refusal.value)) < 500 + len(str(path))


def test_a_duplicated_site_in_a_file_is_refused():
    site = entry_of(random_mask(0, (2, 4))).line()
    with pytest.raises(FormatError, match="'w' appears twice"):
        Lock.loads(f'{{"format_version": 2, "pattern": "50%", "sites": [{site}, {site}]}}')


def test_an_enormous_file_is_refused_unread(tmp_path):
    path = tmp_path / "huge.lock.json"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(FormatError, match="the limit is 67108864"):
        load_lock(path)


def test_a_missing_lock_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"none\.json: there is no such file"):
        load_lock(tmp_path / "none.json")
