"""The optimizers against the libraries' classes used by hand, the rates against a stepped one."""

import copy
import inspect
import math

import pytest
import torch
from torch import nn
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from ditty.config.choices import SCHEDULE_OPTIONS, Optimizer, Schedule
from ditty.config.spec import TrainSpec
from ditty.config.specfile import parse_spec
from ditty.distributed.optim import check_schedule, learning_rate, make_optimizer
from ditty.errors import SpecError
from tests.test_specs import MINIMAL

PAGED = [o for o in Optimizer if o.startswith("paged_")]
ON_CPU = [o for o in Optimizer if o not in PAGED]
WHERE = [(o, "cpu") for o in ON_CPU] + [
    pytest.param(o, "cuda", marks=pytest.mark.gpu) for o in Optimizer
]
RATE, DECAY = 1e-2, 0.1


def train_of(optimizer: Optimizer, **changes) -> TrainSpec:
    values = {"learning_rate": RATE, "weight_decay": DECAY, "adam_beta2": 0.95} | changes
    return TrainSpec(optimizer=optimizer, **values)


class Net(nn.Module):
    """Named as transformers names its parts.

    The hidden matrix is large enough for 8-bit state, and of 1,600 columns for paged state too.
    """

    def __init__(self, width: int = 96):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(32, 64)
        self.hidden = nn.Linear(64, width)
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, 32, bias=False)

    def loss(self, step: int) -> torch.Tensor:
        ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(step))
        ids = ids.to(self.hidden.weight.device)
        logits = self.lm_head(self.norm(self.hidden(self.embed_tokens(ids)).relu()))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def take_steps(net: Net, optimizers: list, steps: range) -> None:
    for step in steps:
        net.loss(step).backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = RATE / (step + 1)
            optimizer.step()
            optimizer.zero_grad()


def by_hand(kind: Optimizer, net: Net) -> list:
    """The library's class, with its arguments spelled out."""
    import bitsandbytes.optim as bnb

    matrices = [net.embed_tokens.weight, net.hidden.weight, net.lm_head.weight]
    vectors = [net.hidden.bias, net.norm.weight, net.norm.bias]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    adam = {"betas": (0.9, 0.95), "eps": 1e-8}
    torchs = {**adam, "fused": net.hidden.weight.is_cuda}
    if kind is Optimizer.MUON:
        rest = [{**groups[0], "params": [matrices[0], matrices[2]]}, groups[1]]
        muon = torch.optim.Muon([matrices[1]], RATE, DECAY, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(rest, RATE, **torchs)]
    return [
        {
            Optimizer.ADAMW: lambda: torch.optim.AdamW(groups, RATE, **torchs),
            Optimizer.ADAMW_8BIT: lambda: bnb.AdamW8bit(groups, RATE, **adam),
            Optimizer.PAGED_ADAMW: lambda: bnb.PagedAdamW(groups, RATE, **adam),
            Optimizer.PAGED_ADAMW_8BIT: lambda: bnb.PagedAdamW8bit(groups, RATE, **adam),
            Optimizer.LION: lambda: bnb.Lion(groups, RATE, betas=(0.9, 0.99)),
            Optimizer.LION_8BIT: lambda: bnb.Lion8bit(groups, RATE, betas=(0.9, 0.99)),
            Optimizer.PAGED_LION: lambda: bnb.PagedLion(groups, RATE, betas=(0.9, 0.99)),
            Optimizer.PAGED_LION_8BIT: lambda: bnb.PagedLion8bit(groups, RATE, betas=(0.9, 0.99)),
            Optimizer.ADAFACTOR: lambda: torch.optim.Adafactor(groups, RATE),
        }[kind]()
    ]


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("kind, device", WHERE)
def test_five_steps_equal_the_librarys_own(kind, device):
    ours, theirs, start = (Net().to(device) for _ in range(3))
    optimizer = make_optimizer(dict(ours.named_parameters()), train_of(kind))
    take_steps(ours, [optimizer], range(5))
    take_steps(theirs, by_hand(kind, theirs), range(5))
    assert same(ours, theirs) and not same(ours, start)
    assert ours.loss(0) < start.loss(0)


def test_adamw_follows_the_formula():
    """Loshchilov and Hutter, arXiv:1711.05101, algorithm 2, in double precision."""
    net = Net().double()
    weights = {n: p.detach().clone() for n, p in net.named_parameters()}
    mean, square = ({n: torch.zeros_like(w) for n, w in weights.items()} for _ in range(2))
    optimizer = make_optimizer(dict(net.named_parameters()), train_of(Optimizer.ADAMW))
    for step in range(1, 6):
        net.loss(step).backward()
        for name, parameter in net.named_parameters():
            g, w = parameter.grad, weights[name]
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.95 * square[name] + 0.05 * g**2
            m, v = mean[name] / (1 - 0.9**step), square[name] / (1 - 0.95**step)
            decay = 0.0 if w.ndim < 2 else DECAY
            weights[name] = w - RATE * (m / (v.sqrt() + 1e-8) + decay * w)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in net.named_parameters():
        assert torch.allclose(parameter, weights[name], rtol=1e-10, atol=1e-12), name


@pytest.mark.parametrize("kind, device", WHERE)
def test_decay_shrinks_matrices_and_leaves_norms_and_biases_alone(kind, device):
    net, start = Net().to(device), Net().to(device)
    optimizer = make_optimizer(dict(net.named_parameters()), train_of(kind))
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for (name, after), before in zip(net.named_parameters(), start.parameters(), strict=True):
        factor = 1 - RATE * DECAY if before.ndim == 2 else 1.0
        assert torch.allclose(after, before * factor, rtol=1e-6, atol=0), name


@pytest.mark.parametrize("kind, device", WHERE)
def test_state_put_into_a_fresh_optimizer_continues_bitwise(kind, device):
    whole, train = Net().to(device), train_of(kind)
    names = [n for n, _ in whole.named_parameters()]
    optimizer = make_optimizer(dict(whole.named_parameters()), train)
    take_steps(whole, [optimizer], range(3))
    state = {n: copy.deepcopy(optimizer.state[p]) for n, p in whole.named_parameters()}
    assert all(state[n] for n in names), "a parameter without state"
    resumed = copy.deepcopy(whole)
    take_steps(whole, [optimizer], range(3, 5))

    fresh = make_optimizer(dict(resumed.named_parameters()), train)
    by_id = {id(p): n for n, p in resumed.named_parameters()}
    order = [by_id[id(p)] for group in fresh.param_groups for p in group["params"]]
    assert sorted(order) == sorted(names)
    groups = fresh.state_dict()["param_groups"]
    fresh.load_state_dict(
        {"state": {i: state[n] for i, n in enumerate(order)}, "param_groups": groups}
    )
    take_steps(resumed, [fresh], range(3, 5))
    assert same(whole, resumed)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", PAGED)
def test_loaded_state_is_paged_again(kind):
    """Through host memory, as a checkpoint goes; bitsandbytes alone leaves it on the GPU."""
    net = Net(width=1600).to("cuda")
    optimizer = make_optimizer(dict(net.named_parameters()), train_of(kind))
    take_steps(net, [optimizer], range(2))
    saved = optimizer.state_dict()
    resumed = copy.deepcopy(net)
    fresh = make_optimizer(dict(resumed.named_parameters()), train_of(kind))
    fresh.load_state_dict(saved)
    for a, b in ((optimizer, net), (fresh, resumed)):
        state = a.state[b.hidden.weight]
        assert all(state[k].is_paged for k in state if k in ("state1", "state2"))
    take_steps(net, [optimizer], range(2, 5))
    take_steps(resumed, [fresh], range(2, 5))
    assert same(net, resumed)


def test_muon_is_for_hidden_matrices():
    names = {
        "model.embed_tokens.weight", "transformer.wte.weight", "transformer.wpe.weight",
        "gpt_neox.embed_in.weight", "transformer.word_embeddings.weight", "lm_head.weight",
        "base_model.model.lm_head.modules_to_save.default.weight", "model.layers.0.norm.weight",
    }  # fmt: skip
    hidden = {
        "model.layers.0.self_attn.q_proj.weight", "transformer.h.0.attn.c_attn.weight",
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight",
    }  # fmt: skip
    tensors = {n: nn.Parameter(torch.ones(4, 4)) for n in names | hidden}
    tensors["model.layers.0.norm.weight"] = nn.Parameter(torch.ones(4))
    tensors["model.layers.0.mlp.experts.up_proj"] = nn.Parameter(torch.ones(2, 4, 4))
    optimizer = make_optimizer(tensors, train_of(Optimizer.MUON))
    for p in tensors.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert {n for n, p in tensors.items() if "momentum_buffer" in optimizer.state[p]} == hidden


@pytest.mark.parametrize("kind", ON_CPU)
def test_shards_without_elements_are_left_out(kind):
    full, empty = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(0, 4))
    optimizer = make_optimizer({"a.weight": full, "b.weight": empty}, train_of(kind))
    assert [p.numel() for g in optimizer.param_groups for p in g["params"]] == [12]
    full.grad, empty.grad = torch.ones(3, 4), torch.ones(0, 4)
    optimizer.step()
    assert full.max() < 1
    nothing = make_optimizer({"b.weight": empty}, train_of(kind))
    nothing.step()
    assert not nothing.state and nothing.param_groups


@pytest.mark.parametrize("kind", PAGED)
def test_paged_needs_a_gpu(kind):
    with pytest.raises(SpecError, match=rf"{kind} .*expected .* cuda, got cpu; use .*: {kind[6:]}"):
        make_optimizer(dict(Net().named_parameters()), train_of(kind))


OPTIONS = [
    *[(schedule, {}) for schedule in Schedule],
    (Schedule.COSINE, {"num_cycles": 1.5}),
    (Schedule.COSINE_WITH_RESTARTS, {"num_cycles": 3}),
    (Schedule.POLYNOMIAL, {"lr_end": 0.01, "power": 2}),
    (Schedule.INVERSE_SQRT, {"timescale": 7}),
    (Schedule.COSINE_WITH_MIN_LR, {"min_lr": 0.02}),
    (Schedule.COSINE_WITH_MIN_LR, {"min_lr_rate": 0.3, "num_cycles": 1}),
    (Schedule.COSINE_WARMUP_WITH_MIN_LR, {"min_lr": 0.02, "warmup_lr_rate": 0.05}),
    (Schedule.WARMUP_STABLE_DECAY, {"num_decay_steps": 9, "decay_type": "1-sqrt"}),
    (Schedule.WARMUP_STABLE_DECAY, {"num_stable_steps": 20, "min_lr_ratio": 0.1}),
]
TOTAL = 30


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("schedule, options", OPTIONS)
@pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps")
def test_rates_equal_transformers_stepped(schedule, options, warmup):
    train = TrainSpec(
        schedule=schedule, schedule_options=options, warmup_steps=warmup, learning_rate=0.3
    )
    check_schedule(train)
    name = "constant_with_warmup" if schedule is Schedule.CONSTANT else schedule.value
    options = dict(options)
    if "min_lr" in schedule and not options:
        options = {"min_lr_rate": 0.1}
    if schedule is Schedule.WARMUP_STABLE_DECAY and "num_decay_steps" not in options:
        options["num_decay_steps"] = TOTAL - warmup - 20 if options else 3
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    reference = get_scheduler(name, optimizer, warmup, TOTAL, options)
    for step in range(TOTAL):
        assert learning_rate(step, TOTAL, train) == optimizer.param_groups[0]["lr"], step
        optimizer.step()
        reference.step()


def test_rates_are_those_of_before():
    """What ditty 0.1 computed itself: runs resumed now see the same rates, up to rounding."""
    for schedule in (Schedule.COSINE, Schedule.LINEAR, Schedule.CONSTANT):
        train = TrainSpec(schedule=schedule, warmup_steps=4, learning_rate=0.3)
        for step in range(17):
            progress = (step - 4) / 13
            curve = {
                Schedule.COSINE: 0.5 * (1 + math.cos(math.pi * progress)),
                Schedule.LINEAR: 1 - progress,
                Schedule.CONSTANT: 1.0,
            }[schedule]
            expected = 0.3 * (step / 4 if step < 4 else curve)
            assert learning_rate(step, 17, train) == pytest.approx(expected, rel=0, abs=1e-16)


@pytest.mark.parametrize("schedule", Schedule)
def test_the_options_are_those_of_transformers_function(schedule):
    ours = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    name = "constant_with_warmup" if schedule is Schedule.CONSTANT else schedule.value
    theirs = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters
    table = SCHEDULE_OPTIONS[schedule]
    assert table.keys() == theirs.keys() - ours
    for option, kind in table.items():
        # Annotations are text there ("int | None"), and missing where a default says as much.
        said = str(theirs[option].annotation)
        assert kind is next((t for t in (str, int) if t.__name__ in said), float), option


@pytest.mark.parametrize(
    "schedule, options, message",
    [
        ("cosine", {"min_lr": 1e-5}, r"min_lr: 1e-05 is no option of schedule: cosine.*num_cycles"),
        ("constant", {"num_cycles": 2}, r"no option of schedule: constant; expected none"),
        ("linear", {"last_epoch": 2}, r"last_epoch: 2\.0 is no option"),
        ("cosine", {"num_cycles": "two"}, r"num_cycles: 'two'.*num_cycles \(a number\)"),
        ("cosine_with_restarts", {"num_cycles": 1.5}, r"num_cycles: 1\.5.*\(a whole number\)"),
        ("cosine", {"num_cycles": math.inf}, r"num_cycles: inf"),
        ("warmup_stable_decay", {"decay_type": 3}, r"decay_type: 3.*decay_type \(a word\)"),
    ],
)
def test_options_that_a_schedule_has_not_are_refused_by_the_spec(schedule, options, message):
    train = {"schedule": schedule, "schedule_options": options}
    with pytest.raises(
        SpecError, match=rf"train\.schedule_options: .*{message}.*correct or remove"
    ):
        parse_spec(MINIMAL | {"train": train})


@pytest.mark.parametrize(
    "schedule, options, message",
    [
        ("warmup_stable_decay", {"decay_type": "sharp"}, r"Unknown decay type: sharp"),
        ("polynomial", {"lr_end": 1.0}, r"lr_end \(1\.0\) must be smaller than initial lr"),
        ("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}, r"Only one of min_lr"),
        ("inverse_sqrt", {"timescale": 0}, r"schedule: inverse_sqrt.*division by zero"),
        ("inverse_sqrt", {"timescale": -5}, r"schedule: inverse_sqrt"),
        ("polynomial", {"lr_end": -1.0}, r"the learning rate of step .* would be -"),
    ],
)
def test_options_that_a_schedule_cannot_use_are_refused(schedule, options, message):
    train = TrainSpec(schedule=schedule, schedule_options=options)
    with pytest.raises(SpecError, match=message) as error:
        check_schedule(train)
    assert "train.schedule_options" in str(error.value) and "correct or remove" in str(error.value)
