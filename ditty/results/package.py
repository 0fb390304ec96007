"""What is exported: the files of a result, and beside them what others need to use it.

The files are linked, not copied: the result and its package share them on the disk.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ditty.dataset.encoding import IGNORED
from ditty.stages.stageline import StageRef, make_ref
from ditty.store.artifacts import Store, read_manifest
from ditty.store.files import canonical_json, link, make_dir, read_json, sha256_bytes

GENERATION_CONFIG = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
ENDS_ROWS = 256  # that are looked at for what they end with
ENDS_SHARE = 0.25  # of the documents must end with a token that is taken for an end


def learned_ends(rows: Iterable[Mapping[str, Any]]) -> list[int]:
    """The tokens with which supervised text of packed rows ends: what the model says at its end.

    That of a chat template need not be the tokenizer's eos, and what was cut off ends anywhere.
    """
    ends: Counter[int] = Counter()
    for row in islice(rows, ENDS_ROWS):
        ids, labels, start = row["input_ids"], row["labels"], 0
        for length in row["lengths"]:
            inside = range(start, start + length)
            learned = [i for i in inside if labels[i] != IGNORED]
            ends.update(ids[i] for i in learned[-1:])
            start += length
    return sorted(end for end, count in ends.items() if count >= ENDS_SHARE * ends.total())


def taught_ends(trained: Path) -> list[int]:
    """`learned_ends` of a training by its artifact; none where it is from before they were kept."""
    ends: list[int] = read_manifest(trained).facts.get("ends", [])
    return ends


def generation_config(folder: Path, ends: Iterable[int]) -> bytes:
    """The generation config of a result, which ends where the model has learned to.

    Args:
        folder: the result; an adapter has no config of its own.
        ends: ids of `learned_ends`.
    """
    config = read_json(folder / GENERATION_CONFIG)
    if config is None:
        model = read_json(folder / "config.json") or {}
        config = {key: model[key] for key in TOKEN_IDS if model.get(key) is not None}
    stops = list(dict.fromkeys([*_listed(config), *_eos(folder), *ends]))
    if stops:
        config["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    return canonical_json(config) + b"\n"


def generation_ends(folder: Path) -> list[int]:
    """Where the generation config in `folder` ends."""
    return _listed(read_json(folder / GENERATION_CONFIG) or {})


def _listed(config: dict[str, Any]) -> list[int]:
    found = config.get("eos_token_id")
    return found if isinstance(found, list) else [] if found is None else [found]


def _eos(folder: Path) -> list[int]:
    """The tokenizer's own end."""
    file = folder / "tokenizer.json"
    token = (read_json(folder / "tokenizer_config.json") or {}).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if not token or not file.is_file():
        return []
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(file)).token_to_id(token)
    return [] if found is None else [found]


def package_ref(made: StageRef, beside: Mapping[str, bytes]) -> StageRef:
    """The stage that puts files beside those of `made`, in place of its own of that name."""
    contents = {name: sha256_bytes(data) for name, data in beside.items()}
    inputs = {made.stage: made.key, "beside": contents}
    return make_ref("package", f"package {made.stage} {made.key[:8]}", inputs)


def package(made: StageRef, beside: Mapping[str, bytes], store: Store, out: Path) -> dict[str, Any]:
    """Fill the folder `out` with the files of `made`, whose artifact is there, and `beside`."""
    source = store.path(made.stage, made.key)
    for name in read_manifest(source).files:
        if name not in beside:
            make_dir((out / name).parent)
            link(source / name, out / name)
    for name, data in beside.items():
        (out / name).write_bytes(data)
    return {"of": made.stage}
