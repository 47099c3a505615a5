"""Laws over the table of side networks: a new one gets them by existing."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

from awake import tiny_vit, wake
from restuning import Bank, Host, MultiTask, Needs, Task, Tuned, load, save
from restuning._errors import FormatError, TunerShapeError, UnknownNameError
from restuning.bench.rivals.beside import Ladder
from restuning.bypass import (
    Bypass,
    Ensemble,
    Finer,
    GridRidge,
    MixingBypass,
    Nearest,
    Pooling,
    Ridge,
    SideNetwork,
    UNetBypass,
    from_spec,
    kinds,
    side_network,
)
from restuning.bypass.side_network import _REGISTRY
from restuning.host.parts import compute_part
from restuning.problems import Segmentation
from restuning.sites import FEATURE, PARTS, Features, is_stream, split_tap, take_one_token
from restuning.tuners import LowRankAttention, ResAdapter, Tuner

WIDTH, TOKENS, ROWS, CLASSES = 48, 17, 5, 3
"""As of `tiny_vit`: a class token and a grid of 4 x 4."""
TAPS = ["block.0", "block.1", "block.2", "block.3"]
BLOCKS = [
    ["token", "block.1"],
    ["deviation", "block.2"],
    ["places", "block.3"],
    ["mean", "block.3"],
]
SAME_TOLERANCE = 1e-5
"""Products of other sizes round elsewhere."""
BF16_TOLERANCE = 0.1
"""Three decimal digits, through a few layers, on values of about one."""


def adapter():
    return ResAdapter(WIDTH, rank=3, zero=False)


def streams(rows=ROWS):
    draw = torch.Generator().manual_seed(1)
    taps = {name: torch.randn(rows, TOKENS, WIDTH, generator=draw) for name in TAPS}
    # Parts of taps are taps like others to who reads them.
    parts = {f"{n}/{part}": compute_part(part, t) for n, t in taps.items() for part in PARTS}
    return taps | parts | {f"{FEATURE}/{pool}": taps[TAPS[-1]][:, :1] for pool in ("cls", "mean")}


def maps(rows=ROWS):
    draw = torch.Generator().manual_seed(1)
    shapes = {"stage.1": (2, 2, 8), "stage.2": (4, 4, 8), "stage.3": (4, 4, 4)}
    return {n: torch.randn(rows, *shape, generator=draw) for n, shape in shapes.items()}


SAMPLES = {
    "bypass": (
        lambda: Bypass(TAPS, [WIDTH] * 4, [adapter() for _ in range(3)], [None] * 3),
        streams,
    ),
    "mixing": (
        lambda: MixingBypass(
            TAPS[1:],
            [WIDTH] * 3,
            [[LowRankAttention(8, rank=4, heads=2)] for _ in range(3)],
            Pooling(8),
        ),
        streams,
    ),
    "mixing to a finer grid": (
        lambda: MixingBypass(
            TAPS[1:],
            [WIDTH] * 3,
            [[LowRankAttention(8, rank=4, heads=2)] for _ in range(3)],
            Finer(8, [WIDTH] * 3, 2),
        ),
        streams,
    ),
    "grid-ridge": (lambda: GridRidge(TAPS[1:], [WIDTH] * 3, CLASSES, 2), streams),
    "mixing of parts": (
        lambda: MixingBypass(
            [f"{tap}/tokens" for tap in TAPS[1:]],
            [WIDTH] * 3,
            [[LowRankAttention(8, rank=4, heads=2)] for _ in range(3)],
            Pooling(8, token=None, grid=False),
        ),
        streams,
    ),
    "ridge": (lambda: Ridge(TAPS[1:], [WIDTH] * 3, CLASSES, blocks=BLOCKS, weighted=True), streams),
    "knn": (lambda: Nearest("block.3", WIDTH, CLASSES, rows=6), streams),
    "unet": (
        lambda: UNetBypass(
            list(maps()), [8, 8, 4], [ResAdapter(8, rank=2), None, None], [None, None]
        ),
        maps,
    ),
    "ensemble": (
        lambda: Ensemble(
            [SAMPLES["ridge"][0](), *[SAMPLES["mixing"][0]() for _ in range(2)]],
            [None, *[WIDTH + Pooling(8).features] * 2],
            CLASSES,
        ),
        streams,
    ),
    "ladder": (lambda: Ladder(TAPS, WIDTH, 4, 3), streams),
}


def readout(state, pool=None, mask=None):
    """A stand-in of the backbone's: the class token of tokens, the mean of a map."""
    return state[:, 0] if state.dim() == 3 else state.mean((1, 2))


def awake(network):
    """Buffers are numbers, too: those of what is solved are zero at the start."""
    wake(network)
    draw = torch.Generator().manual_seed(2)
    for buffer in network.buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=draw) / 10)
    return network.eval()


@pytest.fixture(params=sorted({*kinds(), *SAMPLES}))
def sample(request):
    where = "tests/laws/test_side_networks.py"
    assert request.param in SAMPLES, f"give {where} a sample of {request.param}"
    make, taps = SAMPLES[request.param]
    return awake(make()), taps()


def answer(network, taps):
    return network.feature(taps, readout, "cls")


def test_it_knows_its_kind_its_taps_and_its_tuners(sample):
    network, taps = sample
    assert isinstance(network, SideNetwork)
    assert kinds()[network.kind] is type(network)
    assert set(network.taps) <= set(taps)
    read = {split_tap(name)[0] for name in network.needs("cls").taps}
    assert read <= {split_tap(name)[0] for name in network.taps}
    assert all(isinstance(t, Tuner) for t in network.tuners)
    assert all(name in dict(network.named_parameters()) for name in network.lambda_names)


def test_no_gradient_reaches_the_taps_and_every_parameter_learns(sample):
    network, taps = sample
    taps = {name: tap.requires_grad_() for name, tap in taps.items()}
    made = answer(network, taps)
    if not any(True for _ in network.parameters()):
        assert not made.requires_grad or network.solved_parameters
        return
    weights = torch.randn(made.shape, generator=torch.Generator().manual_seed(0))
    (made * weights).sum().backward()
    # The readout takes one token, and a frozen feature may stand beside: both are not the network's.
    assert all(tap.grad is None for tap in taps.values())
    assert all(p.grad is not None for p in network.parameters())


def test_its_spec_builds_it_again_through_json(sample):
    network, taps = sample
    spec = json.loads(json.dumps(network.spec()))
    assert spec["kind"] == network.kind
    again = from_spec(spec)
    assert again.spec() == spec
    again.load_state_dict(network.state_dict())
    assert torch.equal(answer(again.eval(), taps), answer(network, taps))


def test_an_argument_it_does_not_have_is_refused(sample):
    network, _ = sample
    if type(network).from_spec.__func__ is not SideNetwork.from_spec.__func__:
        pytest.skip("it reads its spec itself")
    with pytest.raises(FormatError, match="unknown arguments"):
        from_spec({**network.spec(), "colour": "red"})


@pytest.mark.parametrize("pool", ["cls", "mean", "all"])
def test_what_it_says_it_needs_is_enough(sample, pool):
    network, taps = sample
    if pool == "all" and getattr(network, "in_parts", False):
        with pytest.raises(TunerShapeError, match="every token"):
            network.needs(pool)
        return
    needs = network.needs(pool)
    few = {name: taps[name] for name in needs.taps}
    if needs.tokens in ("cls", "last"):
        few = {n: take_one_token(t, needs.tokens) if is_stream(n) else t for n, t in few.items()}
    if pool == "cls":
        torch.testing.assert_close(
            answer(network, few), answer(network, taps), atol=SAME_TOLERANCE, rtol=SAME_TOLERANCE
        )
    else:
        made, whole = (network.feature(each, readout, pool) for each in (few, taps))
        assert made.shape == whole.shape


def test_a_row_is_answered_alike_whatever_stands_beside_it(sample):
    network, taps = sample
    alone = {name: tap[1:2] for name, tap in taps.items()}
    torch.testing.assert_close(
        answer(network, alone),
        answer(network, taps)[1:2],
        atol=SAME_TOLERANCE,
        rtol=SAME_TOLERANCE,
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])  # noqa: S301
def test_copies_answer_alike_and_share_nothing(sample, copied):
    network, taps = sample
    again = copied(network)
    before = answer(network, taps)
    assert torch.equal(answer(again, taps), before)
    with torch.no_grad():
        for tensor in (*again.parameters(), *again.buffers()):
            tensor.add_(1)
    assert torch.equal(answer(network, taps), before)


def test_it_runs_in_bf16(sample):
    network, taps = sample
    half = copy.deepcopy(network).bfloat16()
    made = answer(half, {name: tap.bfloat16() for name, tap in taps.items()})
    assert made.dtype == torch.bfloat16
    exact = answer(network, taps)
    error = (made.float() - exact).abs().max() / exact.abs().max()
    assert error < BF16_TOLERANCE


def test_where_it_fuses_the_fused_state_is_its_own(sample):
    network, taps = sample
    given = [taps[name] for name in network.taps]
    if not network.can_fuse(given):
        return
    fused = network.run_fused(taps, lambda parameter: torch.stack([parameter, 2 * parameter]))
    torch.testing.assert_close(fused[0], network(taps), atol=SAME_TOLERANCE, rtol=SAME_TOLERANCE)


def test_where_it_stacks_each_answers_as_alone(sample):
    network, taps = sample
    if network.stack_key() is None:
        return
    other = wake(copy.deepcopy(network), seed=5)
    assert network.stack_key() == other.stack_key()
    stack = type(network).stack([network, other])
    given = [taps[name] for name in network.taps]
    for states, members in (
        (stack(given), (network, other)),
        (stack(given, torch.tensor([1])), (other,)),
    ):
        for state, member in zip(states, members, strict=True):
            torch.testing.assert_close(
                state, member(taps), atol=SAME_TOLERANCE, rtol=SAME_TOLERANCE
            )


class Batches:
    """What training shows a network before the first step, which is told what it answers."""

    def __init__(self, taps, network):
        self.taps, self.read = taps, 0
        self.targets = torch.arange(ROWS) % CLASSES
        if isinstance(network, GridRidge):
            network.problem = Segmentation()
            self.targets = torch.arange(ROWS * 64).view(ROWS, 8, 8) % CLASSES

    def __iter__(self):
        self.read += 1
        for rows in (slice(0, 3), slice(3, None)):
            part = {name: tap[rows] for name, tap in self.taps.items()}
            # With the readout on loan, as features of a host and of a store have it.
            yield Features(part, readout), self.targets[rows]


def test_preparing_follows_from_the_spec_and_the_rows_alone(sample):
    network, taps = sample
    one, other = (wake(from_spec(network.spec()), seed=s) for s in (1, 2))
    made = [each.prepare(Batches(taps, each)) for each in (one, other)]
    announced = {n: (ROWS, *shape) for n, shape in network.prepared_taps.items()}
    for found in made:
        assert {n: tuple(t.shape) for n, t in found.items()} == announced
    for name in announced:
        assert torch.equal(made[0][name], made[1][name])
    for a, b in zip(one.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)


def test_without_anything_to_prepare_no_row_is_read(sample):
    network, taps = sample
    batches = Batches(taps, network)
    made = network.prepare(batches)
    assert made or not batches.read


def test_a_task_with_it_is_counted_saved_loaded_and_banked(sample, tmp_path):
    network, taps = sample
    host = Host(tiny_vit(), torch.zeros(1, 3, 32, 32))
    if not set(network.taps) <= set(host.sites.taps):
        return
    x = torch.randn(2, 3, 32, 32)
    head = wake(network.widen(nn.Linear(WIDTH, CLASSES)), seed=3)
    task = Task(side=network, head=head, pool="cls")
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    assert task.trainable_parameters() == trained + network.solved_parameters
    logits = Tuned(host, task).eval()(x)
    # Whatever lies between: some answer at every place.
    assert (logits.shape[0], logits.shape[-1]) == (2, CLASSES)
    again = load(save(task, host, tmp_path / "a.task"), host)
    assert torch.equal(Tuned(host, again)(x), logits)
    bank = Bank({"a": task, "b": copy.deepcopy(task)})
    banked = bank(host.features(x, keep=bank.keep))
    together = MultiTask(host, {"a": task})(x)
    for found in (banked["a"], banked["b"], together["a"]):
        torch.testing.assert_close(found, logits, atol=SAME_TOLERANCE, rtol=SAME_TOLERANCE)


def test_an_unknown_kind_is_named_with_those_that_are_known():
    with pytest.raises(UnknownNameError) as error:
        from_spec({"kind": "nobody"})
    assert "mixing" in error.value.found


@pytest.mark.parametrize("spec", [None, [], {}, {"kind": 3}])
def test_what_is_no_spec_is_refused(spec):
    with pytest.raises(FormatError, match="not the spec of a side network"):
        from_spec(spec)


def test_one_of_no_kind_cannot_be_written_down():
    class Nameless(SideNetwork):
        taps = ("block.3",)

        def needs(self, pool):
            return Needs(self.taps)

        def forward(self, taps):
            return taps["block.3"]

    with pytest.raises(FormatError, match="no kind"):
        Nameless().spec()


def test_one_that_only_inherits_a_kind_is_not_written_down_as_its_parent(sample):
    network, _ = sample
    inherits = copy.copy(network)
    inherits.__class__ = type("Inherits", (type(network),), {})
    with pytest.raises(FormatError, match="no kind"):
        inherits.spec()


def test_a_subclass_of_a_kind_of_its_own_is_written_down_as_itself(sample):
    network, taps = sample
    parent = type(network)
    own = side_network("a test's own")(type("Own", (parent,), {"__init__": parent.__init__}))
    try:
        subclassed = copy.copy(network)
        subclassed.__class__ = own
        again = from_spec(json.loads(json.dumps(subclassed.spec())))
        assert type(again) is own
        again.load_state_dict(network.state_dict())
        assert torch.equal(answer(again.eval(), taps), answer(subclassed, taps))
    finally:
        del _REGISTRY._table["a test's own"]


def test_a_subclass_that_computes_something_else_is_neither_fused_nor_stacked_as_its_parent(sample):
    network, taps = sample

    def forward(self, taps):
        return parent.forward(self, taps) * 3

    parent = type(network)
    other = copy.copy(network)
    other.__class__ = type("Other", (parent,), {"forward": forward})
    assert other.stack_key() is None
    assert not other.can_fuse([taps[name] for name in network.taps])


def test_what_lacks_needs_or_a_forward_is_no_side_network():
    class Half(SideNetwork):
        def forward(self, taps):
            return taps

    with pytest.raises(TypeError, match="needs"):
        Half()


def test_a_kind_is_entered_by_a_decorator():
    @side_network("a test's own")
    class Own(SideNetwork):
        taps = ("block.3",)

        def needs(self, pool):
            return Needs(self.taps)

        def forward(self, taps):
            return taps["block.3"]

    try:
        assert kinds()["a test's own"] is Own
    finally:
        del _REGISTRY._table["a test's own"]
