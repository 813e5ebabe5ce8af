"""Which form runs: a pack that is right is kept, any other is packed anew, else dense, and the reason is told."""

import warnings

import pytest
import torch

from spp_fx.exporters.cusparselt_layout import pack
from spp_fx.runtime.trust import Case, PackedSite, PackWarning, SiteForm, decide, make_weight
from tests.families import prune_2_4
from tests.runtime.libraries import Missing, OutOfMemory, Refuses, RepacksWrong, Right, WrongOrder


def site(
    name: str = "a", m: int = 128, dtype: torch.dtype = torch.float16, sm: int = 80, stored: bool = True
) -> PackedSite:
    weight = torch.randn(m, 128, generator=torch.Generator().manual_seed(m)).to(dtype)
    prune_2_4(weight)
    return PackedSite(
        name,
        (m, 128),
        dtype,
        "cusparselt",
        sm,
        None if stored else "repack at load",
        lambda: {"packed": pack(weight, 80)},
        lambda: weight,
    )


def decided(library, *sites: PackedSite) -> tuple[dict[str, SiteForm], list[str]]:
    """The forms, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        forms = decide(sites, library, {})
    assert all(each.category is PackWarning for each in caught)
    return forms, [str(each.message) for each in caught]


def test_a_right_pack_is_used_without_a_word():
    library = Right()
    assert decided(library, site()) == ({"a": SiteForm("packed")}, [])
    assert "repack" not in library.calls


def test_a_wrong_product_is_packed_anew():
    forms, said = decided(WrongOrder(), site("a"), site("b"), site("c", m=256))
    assert {name: each.form for name, each in forms.items()} == dict.fromkeys("abc", "repacked")
    assert len(said) == 2
    assert said[0].startswith("a and 1 more (128 x 128, float16): the stored pack is not used: times a unit")
    assert "row 0, column 0" in said[0]
    assert said[0].endswith("; it was packed again")
    assert said[1].startswith("c (256 x 128, float16)")


def test_where_neither_is_right_it_runs_dense():
    forms, said = decided(RepacksWrong(), site())
    assert forms["a"].form == "dense"
    assert forms["a"].reason is not None
    assert forms["a"].reason.count("times a unit vector") == 2
    assert said[0].endswith("; it runs dense, without the gain of 2:4")


def test_a_library_that_refuses_leaves_it_dense_and_is_quoted():
    forms, (said,) = decided(Refuses(), site())
    assert forms["a"].form == "dense"
    expected = "stand-in 1.0.0 on a GPU refuses it: Supported only on GPUs with compute capability 8.x"
    assert forms["a"].reason == expected
    assert expected in said


def test_a_pack_for_another_gpu_is_not_even_tried():
    library = Right(sm=90)
    forms, _ = decided(library, site(sm=80))
    assert forms["a"] == SiteForm("repacked", "it is packed for sm80, a GPU is sm90")
    assert "wrap" not in library.calls


def test_a_library_that_is_missing():
    forms, (said,) = decided(Missing(), site())
    assert forms["a"].form == "dense"
    assert "torch is built without it" in said


def test_a_neutral_site_is_packed_at_load():
    forms, (said,) = decided(Right(), site(stored=False))
    assert forms["a"] == SiteForm("repacked", "repack at load")
    assert "repack at load" in said


def test_no_room_on_the_gpu_is_no_verdict():
    with pytest.raises(torch.OutOfMemoryError):
        decide([site()], OutOfMemory(), {})


def test_a_case_is_looked_at_once_in_a_process_and_told_of_each_time():
    known: dict[Case, SiteForm] = {}
    library = WrongOrder()
    for _ in range(2):
        with pytest.warns(PackWarning):
            decide([site("a"), site("b")], library, known)
    assert library.calls.count("wrap") == 1
    assert len(known) == 1


@pytest.mark.parametrize(
    ("sites", "libraries"),
    [
        ((site(), site(m=256)), (Right(), Right())),
        ((site(), site(dtype=torch.bfloat16)), (Right(), Right())),
        ((site(), site()), (Right(), Right(name="stand-in 2.0.0"))),
        ((site(), site()), (Right(), Right(device="another GPU"))),
    ],
)
def test_what_was_found_holds_for_nothing_else(sites, libraries):
    known: dict[Case, SiteForm] = {}
    for each, library in zip(sites, libraries, strict=True):
        decide([each], library, known)
        assert "wrap" in library.calls
    assert len(known) == 2


def test_each_form_is_made_from_what_it_says():
    library, each = Right(), site()
    for form, calls in (("packed", ["wrap"]), ("repacked", ["repack"]), ("dense", [])):
        library.calls.clear()
        assert torch.equal(make_weight(each, form, library), each.dense())
        assert library.calls == calls
