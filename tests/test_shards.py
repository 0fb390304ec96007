"""A model's folder that is written shard by shard: killed at any moment, it is gone on with."""

import multiprocessing
import random
import signal
import time
import weakref
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditty.config.choices import Quantization
from ditty.models import shards
from ditty.models.shards import Piece, write_shards
from ditty.pretrained.modelfolder import INDEX
from ditty.quantization.quantize import quantize
from ditty.store.artifacts import Manifest, Store, verify

from .tiny import make_model_folder, tiny_config

FORK = multiprocessing.get_context("fork")  # after the imports, which take seconds


def pieces(count: int, make: Callable[[int], torch.Tensor]) -> list[Piece]:
    def piece(number: int) -> Piece:
        return Piece(f"t{number}", 8, 8, lambda: {f"t{number}": make(number)})

    return [piece(number) for number in range(count)]


def one(number: int) -> torch.Tensor:
    return torch.full((2,), float(number))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 16)  # two pieces a shard


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """What a file's second writing would change."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("*.safetensors")}


def test_a_failed_call_is_gone_on_with(tmp_path: Path, small: None) -> None:
    made = []

    def fails(number: int) -> torch.Tensor:
        made.append(number)
        if number == 5:
            raise RuntimeError("power cut")
        return one(number)

    with pytest.raises(RuntimeError, match="power cut"):
        write_shards(pieces(9, fails), tmp_path)
    before = stamps(tmp_path)
    assert made == [0, 1, 2, 3, 4, 5] and len(before) == 2 and not (tmp_path / INDEX).exists()

    done = []
    again = pieces(9, lambda number: made.append(number) or one(number))
    count = write_shards(again, tmp_path, lambda *call: done.append(call[:2]))
    assert made[6:] == [4, 5, 6, 7, 8] and count == 5
    assert done[0] == (5 * 8, 9 * 8) and done[-1] == (9 * 8, 9 * 8)  # what stands counts as done
    after = stamps(tmp_path)
    assert len(after) == 5 and after.items() >= before.items()
    merged = {k: v for path in tmp_path.glob("*.safetensors") for k, v in load_file(path).items()}
    assert merged.keys() == {f"t{n}" for n in range(9)}
    assert all(torch.equal(merged[f"t{n}"], one(n)) for n in range(9))


def test_shards_of_another_plan_and_halves_go(tmp_path: Path, small: None) -> None:
    write_shards(pieces(4, one), tmp_path)
    (tmp_path / ".model-00001-of-00003.safetensors.tmp").write_bytes(b"half")
    write_shards(pieces(6, lambda number: one(number + 1)), tmp_path)
    assert len(stamps(tmp_path)) == 3 and not [*tmp_path.glob(".*.tmp")]
    first = load_file(tmp_path / "model-00001-of-00003.safetensors")
    assert torch.equal(first["t0"], one(1))


def test_a_damaged_shard_is_made_again(tmp_path: Path, small: None) -> None:
    write_shards(pieces(4, one), tmp_path)
    path = tmp_path / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    before = stamps(tmp_path)
    write_shards(pieces(4, one), tmp_path)
    after = stamps(tmp_path)
    changed = [name for name in after if after[name] != before[name]]
    assert changed == [path.name] and torch.equal(load_file(path)["t3"], one(3))


def test_an_error_while_writing_is_raised(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_shards(pieces(2, one), tmp_path)  # of the last shard
    with pytest.raises(OSError, match="No space left"):
        write_shards(pieces(20, one), tmp_path)
    assert stamps(tmp_path) == {} and not [*tmp_path.glob(".*.tmp")]


@pytest.mark.parametrize("kills", [3, 10])
def test_killed_at_random_it_ends_alike_and_no_shard_is_done_twice(
    tmp_path: Path, kills: int
) -> None:
    source = make_model_folder(tmp_path / "base", tiny_config(num_hidden_layers=12))
    expected = build(source, tmp_path / "undisturbed", 0.0)
    chance = random.Random(kills)
    part = tmp_path / "store/prequantize/.part-key"
    stands: dict[str, tuple[int, int]] = {}
    for _ in range(kills):
        process = FORK.Process(target=build, args=(source, tmp_path, 0.01))
        process.start()
        wait_for_shards(process, part, len(stands) + chance.randint(1, 3))
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        now = stamps(part)
        assert now.items() >= stands.items(), "a shard that stood was written again"
        stands = now
    manifest = build(source, tmp_path, 0.0)
    final = stamps(tmp_path / "store/prequantize/key")
    assert final.items() >= stands.items() and len(final) > len(stands) >= kills
    assert verify(tmp_path / "store/prequantize/key").digest == expected.digest == manifest.digest
    assert not part.exists()
    print(f"{kills} kills: {len(stands)} of {len(final)} shards stood before the last start")


def build(source: Path, home: Path, seconds: float) -> Manifest:
    """Quantize, with a pause after each tensor."""
    shards.SHARD_BYTES, usual = 4_000, shards.SHARD_BYTES
    try:

        def make(out: Path) -> dict[str, object]:
            def pause(*_: object) -> None:
                time.sleep(seconds)

            return quantize(source, out, Quantization.NF4, "float32", progress=pause)

        return Store(home).build("prequantize", "key", {}, make, resumable=True)
    finally:
        shards.SHARD_BYTES = usual


def wait_for_shards(process: BaseProcess, part: Path, count: int) -> None:
    end = time.monotonic() + 60
    while len(stamps(part)) < count:
        assert process.is_alive(), "it ended before it was killed"
        assert time.monotonic() < end
        time.sleep(0.002)


def test_of_large_pieces_one_is_in_memory_of_small_ones_two(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    most: dict[str, int] = {}

    def piece(number: int, size: int) -> Piece:
        def make() -> dict[str, torch.Tensor]:
            value = torch.full((size // 4,), float(number))
            alive.append(size)
            weakref.finalize(value, alive.remove, size)
            most[str(size)] = max(most.get(str(size), 0), alive.count(size))
            return {f"t{number}": value}

        return Piece(f"t{number}", size, size, make)

    def slow(content: dict[str, torch.Tensor], path: Path, **options: object) -> None:
        time.sleep(0.02)  # the next is made meanwhile, if it may be
        save_file(content, path, **options)

    monkeypatch.setattr(shards, "save_file", slow)
    sizes = [16] * 5 + [40] * 3 + [16] * 5  # a shard each
    write_shards([piece(i, size) for i, size in enumerate(sizes)], tmp_path)
    assert most == {"16": 2, "40": 1} and alive == []
    made = [load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert [len(next(iter(content.values()))) * 4 for content in made] == sizes
