"""load on a GPU, with the real libraries; skipped where there is none."""

import warnings

import pytest
import torch
from torch.sparse import SparseSemiStructuredTensor

from spp_fx.runtime import PackWarning, load, trust
from tests.runtime.exports import exported, logits, reference, save_sparse, wide_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = [torch.float16, torch.bfloat16]


def capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def check(folder, out, dtype):
    """The model computes what the plain one does, and generates; returns its forms and the warnings."""
    trust.DECIDED.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load(out, device="cuda")
    said = [str(each.message) for each in caught if each.category is PackWarning]
    plain = reference(folder).cuda()
    # Two layers of 16-bit products that are added up in other orders.
    close = 16 * torch.finfo(dtype).eps * float(logits(plain).abs().max())
    assert float((logits(loaded) - logits(plain)).abs().max()) <= close
    assert loaded.generate(torch.tensor([[5, 6, 7]], device="cuda"), max_new_tokens=5).shape[1] <= 8
    for name, form in loaded.spp_fx_sites.items():
        sparse = isinstance(loaded.get_parameter(name), SparseSemiStructuredTensor)
        assert sparse == (form.form != "dense"), name
    return loaded.spp_fx_sites, said


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pack_for_this_gpu_runs_as_it_is_stored(tmp_path, dtype):
    """The proof of the metadata's order: the library's products with our bytes are the dense ones."""
    if capability() not in (80, 90):
        pytest.skip(f"the order of packs for sm{capability()} is not known")
    folder = save_sparse(tmp_path / "model", wide_model(dtype=dtype))
    forms, said = check(folder, exported(folder, "cusparselt", sm=capability()), dtype)
    assert said == []
    assert {each.form for each in forms.values()} == {"packed"}


def test_a_pack_for_another_gpu_is_packed_anew(tmp_path):
    other = 80 if capability() != 80 else 90
    folder = save_sparse(tmp_path / "model", wide_model())
    forms, said = check(folder, exported(folder, "cusparselt", sm=other), torch.float16)
    assert {each.form for each in forms.values()} == {"repacked"}
    assert len(said) == 3
    assert all(f"it is packed for sm{other}" in line for line in said)


def test_cutlass_runs_on_ampere_and_is_packed_anew_elsewhere(tmp_path):
    folder = save_sparse(tmp_path / "model", wide_model())
    forms, said = check(folder, exported(folder, "cutlass"), torch.float16)
    assert {each.form for each in forms.values()} == {"packed" if 80 <= capability() < 90 else "repacked"}
    assert bool(said) == (capability() >= 90 or capability() < 80)
