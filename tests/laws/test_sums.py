"""Sums of labelled rows: any order, any shards, any processes, and rows taken out, end in one solution."""

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings

from children import START
from restuning._errors import FormatError, TrainingError, TunerShapeError
from restuning.bypass import Ridge, sums
from restuning.bypass.side_network import SharedRows
from restuning.bypass.solution import solve
from restuning.bypass.sums import Sums, keys_of, keys_of_numbers, keys_of_rows

EQUAL = 1e-6
"""Of the largest number, in fp64: the same sums in another order, and a solution of them."""
ROUNDED = 1e-4
"""Of answers that are kept in single precision, which are tens."""
WIDTH, CLASSES, KINDS = 12, 3, [4, 4, 4]
MANY, FEW = 10_000, 30
"""Rows that are kept: more than there are, and fewer, so that products take their place."""


def drawn(count=150, seed=0, offset=50.0):
    """Rows far from the middle, of features that hang together; one never changes."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    rows = torch.randn(count, WIDTH, generator=draw, dtype=torch.double)
    rows = rows @ torch.randn(WIDTH, WIDTH, generator=draw, dtype=torch.double)
    rows = rows + 2 * F.one_hot(labels, WIDTH) + offset
    rows[:, 5] = 1000.1
    return rows, labels


def of(rows, labels, kept, batch=17, keys=None):
    made = Sums(WIDTH, CLASSES, kept=kept, dtype=torch.double)
    keys = keys_of_rows(rows) if keys is None else keys
    for part in zip(rows.split(batch), labels.split(batch), keys.split(batch), strict=True):
        made.add(*part)
    return made


def assert_one_solution(ours, theirs, weighted=True):
    one, other = (solve(each, KINDS, weighted=weighted) for each in (ours, theirs))
    assert (one.penalty, one.shrinkage, one.count) == (other.penalty, other.shrinkage, other.count)
    for name in ("weight", "bias", "shares", "answers", "left_out"):
        a, b = getattr(one, name), getattr(other, name)
        assert float((a - b).abs().max()) <= EQUAL * max(1.0, float(b.abs().max())), name


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    kept=st.sampled_from([MANY, FEW]),
    batch=st.integers(1, 200),
    shards=st.integers(1, 6),
)
def test_any_order_batches_and_shards_have_one_solution(seed, kept, batch, shards):
    rows, labels = drawn()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    first, *others = [of(rows[part], labels[part], kept, batch) for part in order.chunk(shards)]
    for other in others:
        first.merge(other)
    assert (first.products is None) == (kept == MANY)
    assert_one_solution(first, of(rows, labels, kept))


@pytest.mark.parametrize("weighted", [False, True])
def test_products_say_what_the_rows_themselves_say(weighted):
    """The penalty and scale are of the rows that are kept: so of all rows only, where all are kept."""
    rows, labels = drawn()
    held, formed = of(rows, labels, MANY), of(rows, labels, MANY)
    formed._form_products()
    assert_one_solution(held, formed, weighted)
    one, other = (solve(each, KINDS, weighted=weighted) for each in (held, formed))
    again = [each.leave_out(each.kept.rows, each.kept.labels) for each in (one, other)]
    assert float((again[0] - again[1]).abs().max()) <= EQUAL * float(again[0].abs().max())


def test_rows_that_are_kept_are_those_with_the_lowest_keys_of_all():
    rows, labels = drawn()
    keys = keys_of_numbers(range(len(rows)))
    shards = [of(*(t[n::3] for t in (rows, labels)), FEW, keys=keys[n::3]) for n in range(3)]
    shards[2].merge(shards[0])
    shards[2].merge(shards[1])
    kept = shards[2].kept_rows()
    lowest = keys.sort().indices[:FEW]
    assert torch.equal(kept.keys, keys[lowest])
    assert torch.equal(kept.rows, rows[lowest])
    assert torch.equal(kept.labels, labels[lowest])


@pytest.mark.parametrize("kept", [MANY, FEW])
def test_rows_that_are_taken_out_were_never_in(kept):
    rows, labels = drawn()
    whole = of(rows, labels, kept)
    whole.remove(rows[100:130], labels[100:130])
    whole.remove(rows[130:], labels[130:])
    part = of(rows[:100], labels[:100], kept)
    assert torch.equal(whole.counts, part.counts)
    if kept == MANY:
        return assert_one_solution(whole, part)
    # What is kept becomes fewer, and is some of what would be kept of these rows alone.
    ours, theirs = whole.kept_rows(), part.kept_rows()
    assert set(ours.keys.tolist()) < set(theirs.keys.tolist())
    scale = float(part.products.abs().max())
    assert float((whole.products - part.products).abs().max()) <= EQUAL * scale
    # Once as few are kept there as well, all is equal.
    part._pieces = whole._pieces
    return assert_one_solution(whole, part)


def test_rows_that_came_after_some_were_taken_out_do_not_stand_for_those_that_are_gone():
    """A row with a larger key than those that were dropped would count as if it were one of few."""
    rows, labels = drawn()
    made = of(rows[:100], labels[:100], FEW)
    bound = made.bound
    made.remove(rows[:50], labels[:50])
    made.add(rows[100:], labels[100:])
    assert made.bound <= bound
    assert int(made.kept_rows().keys.max()) <= bound


def test_all_rows_taken_out_leave_nothing():
    rows, labels = drawn(60)
    for kept in (MANY, FEW):
        made = of(rows, labels, kept)
        made.remove(rows, labels)
        assert made.count == 0
        assert not made.sums.any()
        with pytest.raises(TunerShapeError, match="0 rows"):
            solve(made, KINDS, weighted=False)


def test_a_row_that_is_not_in_is_not_taken_out_and_nothing_changes():
    rows, labels = drawn(40)
    made = of(rows[:30], labels[:30], MANY)
    before = made.sums.clone()
    with pytest.raises(TunerShapeError, match="not in"):
        made.remove(rows[25:35], labels[25:35])
    assert made.count == 30
    assert torch.equal(made.sums, before)


def test_a_row_that_is_in_twice_is_taken_out_once():
    rows, labels = drawn(40)
    made = of(torch.cat([rows, rows[:1]]), torch.cat([labels, labels[:1]]), MANY)
    made.remove(rows[:1], labels[:1])
    assert_one_solution(made, of(rows, labels, MANY))
    with pytest.raises(TunerShapeError, match="not in"):
        made.remove(rows[:1].repeat(2, 1), labels[:1].repeat(2))


@pytest.mark.parametrize("kept", [MANY, FEW])
def test_what_is_written_and_read_again_goes_on_as_if_it_had_not_been(kept):
    rows, labels = drawn()
    half = of(rows[:80], labels[:80], kept)
    again = Sums.from_tensors(half.tensors())
    again.add(rows[80:], labels[80:])
    assert_one_solution(again, of(rows, labels, kept))


@pytest.mark.parametrize("spoiled", ["missing", "short", "label", "nan"])
def test_tensors_that_are_no_sums_are_refused(spoiled):
    tensors = of(*drawn(), FEW).tensors()
    if spoiled == "missing":
        del tensors["keys"]
    elif spoiled == "short":
        tensors["rows"] = tensors["rows"][1:]
    elif spoiled == "label":
        tensors["labels"] = tensors["labels"] + CLASSES
    else:
        tensors["products"][0, 0] = torch.nan
    with pytest.raises(FormatError, match="malformed"):
        Sums.from_tensors(tensors)


@pytest.mark.parametrize("kept", [MANY, FEW])
def test_classes_are_added_and_numbered_anew(kept):
    rows, labels = drawn()
    made = of(rows, labels, kept)
    made.set_classes([2, None, 0, 1])
    other = Sums(WIDTH, 4, kept=kept, dtype=torch.double)
    other.add(rows, torch.tensor([2, 3, 0])[labels])
    assert_one_solution(made, other)
    with pytest.raises(TunerShapeError, match="class with rows"):
        made.set_classes([0, 1])


@pytest.mark.parametrize(
    ("rows", "labels"),
    [
        (torch.zeros(2, WIDTH + 1), torch.zeros(2, dtype=torch.long)),
        (torch.zeros(2, WIDTH), torch.zeros(3, dtype=torch.long)),
        (torch.zeros(2, WIDTH), torch.tensor([0, CLASSES])),
        (torch.zeros(2, WIDTH), torch.tensor([0, -1])),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows, labels):
    made = Sums(WIDTH, CLASSES)
    with pytest.raises(TunerShapeError):
        made.add(rows, labels)
    assert made.count == 0


def test_sums_of_another_classifier_are_not_merged():
    with pytest.raises(TunerShapeError, match="other rows"):
        Sums(WIDTH, CLASSES).merge(Sums(WIDTH, CLASSES + 1))


def test_products_that_do_not_fit_into_memory_are_refused_before_they_are_made(monkeypatch):
    monkeypatch.setattr(sums, "_memory_of", lambda device: 100)
    rows, labels = drawn()
    made = of(rows[:FEW], labels[:FEW], FEW)
    with pytest.raises(TrainingError, match="do not fit into memory") as told:
        made.add(rows[FEW:], labels[FEW:])
    assert "held at once" in told.value.found
    assert made.count == FEW


def test_as_many_rows_as_features_are_held_without_products(monkeypatch):
    """They are smaller than their products, however many are kept beside those."""
    monkeypatch.setattr(sums, "_memory_of", lambda device: 0)
    rows, labels = drawn(WIDTH)
    assert of(rows, labels, 4).products is None


def test_keys_follow_from_contents_and_from_nothing_else():
    rows, _ = drawn()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    assert torch.equal(keys_of_rows(rows[order]), keys_of_rows(rows)[order])
    assert int(keys_of([b"\xff" * 32, b"\0" * 8]).min()) == 0
    assert int(keys_of([b"\xff" * 32])) == sums.MOST_KEYS
    assert len(set(keys_of_numbers(range(1000)).tolist())) == 1000


# Of a classifier: rows as a stream, and in several processes.


class Streamed(SharedRows):
    """Rows in batches, of which each process reads every other one."""

    def __init__(self, rows, labels, batch=16, share=(0, 1)):
        self.rows, self.labels, self.batch = rows, labels, batch
        self.first, self.every = share
        self.keys, self.together = None, share[1] > 1
        self.read = 0

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return ((taps, labels) for _, taps, labels in self._read(0, 1))

    def share(self):
        return self._read(self.first, self.every)

    def _read(self, first, every):
        for start in range(first * self.batch, len(self.rows), every * self.batch):
            at = range(start, min(start + self.batch, len(self.rows)))
            self.read += 1
            yield at, {"block.1": self.rows[list(at)].unsqueeze(1)}, self.labels[list(at)]


def classifier():
    # In double: laws are held to `EQUAL`.
    made = Ridge(["block.1"], [WIDTH], CLASSES, grid=False, blocks=[("vector", "block.1")])
    return made.double()


@pytest.mark.parametrize("kept", [MANY, FEW])
def test_a_pass_gives_what_all_rows_at_once_give(monkeypatch, kept):
    monkeypatch.setattr(sums, "KEPT", kept)
    rows, labels = drawn(offset=0.0)
    streamed, whole = classifier(), classifier()
    source = Streamed(rows, labels)
    answers = streamed.prepare(source)[streamed.name]
    inputs = whole.inputs({"block.1": rows.unsqueeze(1)})
    again = whole.fit(inputs, labels)
    for ours, theirs in ((streamed.weight, whole.weight), (answers, again)):
        assert float((ours - theirs).abs().max()) <= EQUAL * float(theirs.abs().max())
    batches = -(-len(rows) // source.batch)
    # A second reading only for rows that are not kept.
    assert source.read == batches * (1 if kept == MANY else 2)
    left_out, truth = classifier().solve(source)
    assert len(left_out) == len(truth) == min(kept, len(rows))


def test_an_iterator_that_ends_is_refused_where_rows_must_be_read_again(monkeypatch):
    monkeypatch.setattr(sums, "KEPT", FEW)
    rows, labels = drawn(offset=0.0)
    once = iter(list(Streamed(rows, labels)))
    with pytest.raises(TrainingError, match="second time"):
        classifier().prepare(once)
    assert len(classifier().solve(iter(list(Streamed(rows, labels))))[0]) == FEW


def test_a_copy_does_not_carry_the_sums():
    import copy

    rows, labels = drawn(offset=0.0)
    made = classifier()
    made.solve(Streamed(rows, labels))
    assert made.sums is not None
    again = copy.deepcopy(made)
    assert again.sums is None
    assert torch.equal(again.weight, made.weight)


def in_one_of(rank, world, kept, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    sums.KEPT = kept
    try:
        rows, labels = drawn(offset=0.0)
        made = classifier()
        # Fewer batches than processes would leave one without rows.
        source = Streamed(rows, labels, 100, share=(rank, world))
        answers = made.prepare(source)[made.name]
        torch.save({"weight": made.weight, "answers": answers}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kept", [MANY, FEW])
def test_processes_read_a_share_each_and_all_end_with_the_solution_of_one(
    monkeypatch, tmp_path, kept
):
    world = 3
    torch.multiprocessing.start_processes(
        in_one_of, (world, kept, str(tmp_path)), world, start_method=START
    )
    monkeypatch.setattr(sums, "KEPT", kept)
    rows, labels = drawn(offset=0.0)
    alone = classifier()
    answers = alone.prepare(Streamed(rows, labels, 100))[alone.name]
    for rank in range(world):
        left = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for ours, theirs in ((left["weight"], alone.weight), (left["answers"], answers)):
            assert float((ours - theirs).abs().max()) <= EQUAL * float(theirs.abs().max())


def test_beside_products_a_row_that_should_be_kept_and_is_not_was_not_added():
    rows, labels = drawn()
    made = of(rows, labels, FEW)
    made.kept_rows()
    stranger = torch.tensor([made.bound - 1])
    with pytest.raises(TunerShapeError, match="not in"):
        made.remove(rows[:1] + 1, labels[:1], stranger)
    assert made.count == len(rows)


def test_without_a_kept_row_nothing_is_chosen():
    rows, labels = drawn()
    made = of(rows, labels, FEW)
    made.remove(*(each.clone() for each in made.kept_rows()))
    assert made.count == len(rows) - FEW
    with pytest.raises(TunerShapeError, match="penalty and scale"):
        solve(made, KINDS, weighted=False)
    with pytest.raises(TunerShapeError, match="penalty and scale"):
        solve(made, KINDS, weighted=True)
