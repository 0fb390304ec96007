"""All that the README of the seed of this project shows, as it is written there, line by line.

`Data(load_args=...)`, `prepare` with filter, batched map and truncate, `fire.Fire` of a `Pipeline`
subclass; on the architectures and with the methods that it names.
"""

import json
import os

import fire
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ditty import Data, Pipeline
from ditty.runs.rundir import RunDir
from tests import warm
from tests.architectures import TRAINED
from tests.scenarios import free_port
from tests.tiny import make_model_folder, make_tokenizer

WORDS = [f"def function_{i}(): return {'x + ' * (i % 6)}{i}" for i in range(40)]


def filter_longer(row):
    return len(row["code"]) < 50


def do_something(rows):
    return dict(make_tokenizer()(rows["code"]))


def truncate(row):
    return {key: values[:32] for key, values in row.items()}


class MyPipeline(Pipeline):
    def __init__(self, dataset_name: str, dataset_language: str = "python", **options):
        super().__init__(**options)
        self.dataset_name, self.dataset_language = dataset_name, dataset_language

    def dataset(self) -> DataLoader:
        columns = ["code", "language"]
        data = Data(
            load_args=(self.dataset_name, self.dataset_language),
            tokenizer=self.tokenizer,
            seed=self.seed,
            batch_size=self.batch_size,
            grad_accum=self.grad_accum,
        )
        return data.prepare(
            [
                ("filter", filter_longer, {}),
                ("map", do_something, dict(batched=True, remove_columns=columns)),  # noqa: C408
                ("map", truncate, {}),
            ]
        )


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """A data set of two languages, in a folder as the hub has it."""
    folder = tmp_path_factory.mktemp("code")
    for language in ("python", "go"):
        rows = [{"code": f"{word} # {language}", "language": language} for word in WORDS]
        (folder / f"{language}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    configs = "".join(
        f"- config_name: {language}\n  data_files: {language}.jsonl\n"
        for language in ("python", "go")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return folder


@pytest.fixture(scope="module", params=["gpt_neox", "llama", "mistral"])
def model(request, tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp(request.param), TRAINED[request.param])


def reference(model, quantized):
    config = BitsAndBytesConfig(load_in_8bit=True) if quantized else None
    return AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    ).eval()


@torch.no_grad()
def mean_loss(model, batches):
    """Token-weighted mean of transformers' own loss on the padded batches."""
    total = count = 0.0
    for batch in batches:
        n = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * n
        count += n
    return total / count


METHODS = {
    "lora": ["--adapter=lora"],
    "8bit": ["--adapter=lora", "--quantization=int8"],
    "full": ["--adapter=none"],
}


@pytest.mark.parametrize("method", METHODS)
def test_the_seeds_readme(model, code, home, tmp_path, method):
    flags = [
        f"--dataset_name={code}",
        f"--model_name_or_path={model}",
        f"--output_dir={tmp_path / 'out'}",
        *("--batch_size=2", "--grad_accum=2", "--max_steps=3", "--learning_rate=1e-3"),
        *("--precision=fp32", *METHODS[method]),
    ]
    outcome = fire.Fire(MyPipeline, command=[*flags, "run"])
    assert outcome.finished and outcome.step == 3
    run = RunDir(tmp_path / "out")
    records = [r for r in run.metrics() if r["kind"] == "train"]

    base = reference(model, method == "8bit")
    loader = MyPipeline(str(code), base_model=str(model), batch_size=2, grad_accum=2).dataset()
    batches = list(loader)
    assert all(b["input_ids"].shape[1] <= 32 for b in batches)
    kept = [f"{word} # python" for word in WORDS if len(f"{word} # python") < 50]
    assert 0 < len(kept) == sum(len(b["input_ids"]) for b in batches) < len(WORDS)
    # int8 rounds activations: the last bits of what padding and packing compute may tip one over.
    close = 1e-4 if method == "8bit" else 1e-5
    assert records[0]["loss"] == pytest.approx(mean_loss(base, batches[:2]), rel=close)
    assert (home / "store/prequantize").exists() == (method == "8bit")

    final = run.root / "final"
    if method == "full":
        trained = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    else:
        adapter = load_file(final / "adapter_model.safetensors")
        assert all(v.abs().sum() > 0 for v in adapter.values())
        trained = PeftModel.from_pretrained(base, final)
    seen = batches[:6]  # what was trained on
    assert mean_loss(trained.eval(), seen) < mean_loss(reference(model, method == "8bit"), seen)


ON_TWO = {
    "8bit": ["--quantization=int8", "--sharding=ddp"],
    "fsdp_qlora": ["--quantization=nf4", "--sharding=fsdp2"],
    "zero3": ["--adapter=none", "--sharding=zero3"],
}


def rank_of_two(rank, port, command):
    """What `accelerate launch --num_processes 2` starts, here from processes with torch."""
    number = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in number.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    fire.Fire(MyPipeline, command=command)


@pytest.mark.parametrize(
    "method", ["fsdp_qlora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("8bit", "zero3"))]
)
def test_the_seeds_readme_on_two_processes(code, tmp_path, method):
    """The same batches a step as in one process, so the same losses; and transformers' result."""
    folder = make_model_folder(tmp_path / "model", TRAINED["llama"])
    flags = [f"--dataset_name={code}", f"--model_name_or_path={folder}", "--batch_size=1"]
    flags += ["--max_steps=3", "--learning_rate=1e-3", "--precision=fp32"]
    output, port = tmp_path / "output", free_port()
    both = [*flags, f"--output_dir={tmp_path / 'two'}", "--grad_accum=2", *ON_TWO[method], "run"]
    environment = {**os.environ, **warm.CPU_ONLY}
    ranks = [
        warm.start(rank_of_two, rank, port, both, output=output, environment=environment)
        for rank in range(2)
    ]
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0], output.read_text()[-3000:]
    alone = [*flags, f"--output_dir={tmp_path / 'one'}", "--grad_accum=4", *ON_TWO[method][:1]]
    fire.Fire(MyPipeline, command=[*alone, "run"])
    losses = {
        name: [r["loss"] for r in RunDir(tmp_path / name).metrics() if r["kind"] == "train"]
        for name in ("one", "two")
    }
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-6) and len(losses["two"]) == 3
    states = [json.loads(f.read_text()) for f in (tmp_path / "two").rglob("state.json")]
    assert {state["world_size"] for state in states} == {2}
    one, two = (load_file(*(tmp_path / n / "final").glob("*.safetensors")) for n in ("one", "two"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6)


def test_fire_shows_the_outcome_and_not_a_page_of_help(code, tmp_path, capsys):
    folder = make_model_folder(tmp_path / "model")
    flags = [f"--dataset_name={code}", f"--model_name_or_path={folder}", "--max_steps=1"]
    where = [f"--output_dir={tmp_path / 'out'}", "--precision=fp32"]
    fire.Fire(MyPipeline, command=[*flags, *where, "run"])
    assert capsys.readouterr().out.strip() == "step 1: all steps are done"
