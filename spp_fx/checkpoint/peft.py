"""Adapters of PEFT: told from those of spp-fx, and what can be done with one."""

from dataclasses import dataclass
from pathlib import Path

from spp_fx.checkpoint.json_file import read_object
from spp_fx.checkpoint.strict_json import shown
from spp_fx.errors import FormatError

_CONFIG = "adapter_config.json"
_OURS = frozenset(
    ("format_version", "spp_fx_version", "base_model_fingerprint", "method_parameters", "sites")
)
"""Keys that spp-fx writes and PEFT does not know."""

_NAMES = {
    "LORA": "LoRA",
    "ADALORA": "AdaLoRA",
    "XLORA": "X-LoRA",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "VERA": "VeRA",
    "HIRA": "HiRA",
    "MISS": "MiSS",
    "ROAD": "RoAd",
    "DELORA": "DeLoRA",
    "RANDLORA": "RandLoRA",
    "FOURIERFT": "FourierFT",
    "LN_TUNING": "LayerNorm tuning",
    "PROMPT_TUNING": "prompt tuning",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning",
    "P_TUNING": "p-tuning",
    "PREFIX_TUNING": "prefix tuning",
}
"""How `peft_type` is written in prose; others are shown as they are."""

_PROMPTS = frozenset(
    ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE")
)
"""Kinds that put something before the input, and have no `merge_and_unload`."""


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter of PEFT.

    Attributes:
        folder: where its adapter_config.json lies.
        peft_type: as PEFT writes it: LORA, IA3, PROMPT_TUNING, ...
        base: the base model that it names, or None.
    """

    folder: Path
    peft_type: str
    base: str | None

    @property
    def what(self) -> str:
        """'a LoRA adapter of PEFT'."""
        name = _NAMES.get(self.peft_type) or shown(self.peft_type).strip("'\"")
        return f"{'an' if name[:1] in 'AEIOU' else 'a'} {name} adapter of PEFT"

    @property
    def refusal(self) -> str:
        """Why nothing can be done with it as it is, and what can be."""
        of = f" (of the base model {shown(self.base)})" if self.base else ""
        where = f"{self.folder}: this is {self.what}{of}, not a model and not an adapter of spp-fx: "
        if self.peft_type in _PROMPTS:
            return f"{where}it leaves every weight of its base as it is, so use spp-fx on the base model's folder"
        return (
            f"{where}spp-fx cannot judge it without its base; merge it into the model with peft first "
            "(PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(MERGED)), "
            "then verify the merged folder"
        )

    @property
    def note(self) -> str:
        """What to know of a model that it lies beside."""
        return (
            f"{self.folder / _CONFIG}: {self.what} lies beside the model and is left out: only the model's own "
            "weights are looked at or written; transformers loads it on top of them where peft is installed"
        )


def peft_adapter(folder: Path) -> PeftAdapter | None:
    """The adapter of PEFT in a folder; None where there is none, it is spp-fx's own, or nobody can tell."""
    path = folder / _CONFIG
    if not path.is_file():
        return None
    try:
        config = read_object(path)
    except FormatError:
        return None  # whoever takes it for an adapter of spp-fx says what is wrong with it
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    if not isinstance(kind, str) or not kind or _OURS & config.keys():
        return None
    return PeftAdapter(folder, kind, base if isinstance(base, str) and base else None)
