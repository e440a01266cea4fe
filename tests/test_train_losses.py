"""Losses over vocabularies, in pieces: what they are, their gradients, and what they hold."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ternarize.train import losses
from ternarize.train.losses import Head, Words, choose_words, divergence, text_loss

TOKENS, WIDTH, WORDS = 23, 12, 50
HEADS = [
    {},
    {"bias": True},
    {"factor": 0.25},
    {"cap": 3.0},
    {"bias": True, "factor": 2.0, "cap": 5.0},
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head_of(
    seed: int, width: int = WIDTH, *, bias: bool = False, factor: float = 1.0, cap: float = 0.0
) -> Head:
    weight = random(WORDS, width, seed=seed)
    return Head(weight, random(WORDS, seed=seed + 1) if bias else None, factor, cap)


def plain_logits(hidden: Tensor, head: Head, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The head's definition, in float64."""
    logits = hidden @ weight.T
    logits = (logits if bias is None else logits + bias) * head.factor
    return head.cap * torch.tanh(logits / head.cap) if head.cap else logits


def plain(hidden: Tensor, head: Head, loss: Callable[[Tensor], Tensor]) -> list[Any]:
    """A loss of the logits, and its gradients by hidden states, weight and bias, by autograd."""
    leaves = [hidden, head.weight] + ([] if head.bias is None else [head.bias])
    leaves = [leaf.detach().double().requires_grad_(True) for leaf in leaves]
    bias = leaves[2] if len(leaves) > 2 else None
    value = loss(plain_logits(leaves[0], head, leaves[1], bias))
    return [float(value.detach()), *torch.autograd.grad(value, leaves)]


def ours(hidden: Tensor, head: Head, loss: Callable[[Tensor, Head], Tensor]) -> list[Any]:
    """The same of a loss in pieces; twice the loss is asked for, so that its factor counts."""
    hidden = hidden.detach().requires_grad_(True)
    weight = head.weight.detach().requires_grad_(True)
    bias = None if head.bias is None else head.bias.detach().requires_grad_(True)
    value = loss(hidden, Head(weight, bias, head.factor, head.cap))
    leaves = [each for each in (hidden, weight, bias) if each is not None]
    found = torch.autograd.grad(2 * value, leaves)
    return [float(value.detach()), *(each / 2 for each in found)]


def assert_near(found: list[Any], wanted: list[Any], tolerance: float = 1e-5) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=tolerance, abs=1e-6)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert float((one - other).abs().max()) <= tolerance * float(other.abs().max())


@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("piece", [4, 23, 256])
def test_the_divergence_and_its_gradients_are_those_of_autograd(
    options: dict[str, Any], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_PIECE", piece)
    hidden, target = random(TOKENS, WIDTH, seed=5), random(TOKENS, 7, seed=6)
    student, teacher = head_of(1, **options), head_of(3, 7, **options)
    with torch.no_grad():
        bias = None if teacher.bias is None else teacher.bias.double()
        theirs = plain_logits(target.double(), teacher, teacher.weight.double(), bias)
        log_p = theirs.log_softmax(-1)

    def by_autograd(logits: Tensor) -> Tensor:
        return (
            F.kl_div(logits.log_softmax(-1), log_p, reduction="none", log_target=True)
            .sum(-1)
            .mean()
        )

    def in_pieces(hidden: Tensor, head: Head) -> Tensor:
        return divergence(hidden, target, (head, teacher), Words(), torch.float32)[0]

    assert_near(ours(hidden, student, in_pieces), plain(hidden, student, by_autograd))


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_the_loss_of_a_text_and_its_gradients_are_those_of_autograd(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_PIECE", 5)
    hidden, head = random(TOKENS, WIDTH, seed=5), head_of(1, **options)
    following = torch.randint(WORDS, (TOKENS,), generator=torch.Generator().manual_seed(0))

    def in_pieces(hidden: Tensor, head: Head) -> Tensor:
        return text_loss(hidden, following, head, Words(), torch.float32)[0]

    wanted = plain(hidden, head, lambda logits: F.cross_entropy(logits, following))
    assert_near(ours(hidden, head, in_pieces), wanted)


def test_how_often_the_likeliest_word_is_the_same_is_counted() -> None:
    hidden, target, head = random(TOKENS, WIDTH, seed=5), random(TOKENS, WIDTH, seed=6), head_of(1)
    likeliest = [(each @ head.weight.T).argmax(-1) for each in (hidden, target)]
    _, same = divergence(hidden, target, (head, head), Words(), torch.float32)
    assert float(same) == pytest.approx(float((likeliest[0] == likeliest[1]).float().mean()))
    _, right = text_loss(hidden, likeliest[1], head, Words(), torch.float32)
    assert float(right) == pytest.approx(float(same))


def test_a_word_that_the_teacher_rules_out_adds_nothing() -> None:
    hidden, target = random(TOKENS, WIDTH, seed=5), random(TOKENS, WIDTH, seed=6)
    student = head_of(1)
    bias = torch.zeros(WORDS)
    bias[3] = -torch.inf
    teacher = Head(head_of(2).weight, bias)
    found = ours(
        hidden,
        student,
        lambda h, head: divergence(h, target, (head, teacher), Words(), torch.float32)[0],
    )
    assert all(bool(torch.as_tensor(each).isfinite().all()) for each in found)
    p = (target @ teacher.weight.T + bias).softmax(-1).double()
    q = (hidden @ student.weight.T).softmax(-1).double()
    keep = torch.arange(WORDS) != 3
    wanted = (p * (p / q).log())[:, keep].sum(-1).mean()
    assert found[0] == pytest.approx(float(wanted), rel=1e-5)


def test_no_tokens_have_a_loss_of_nothing() -> None:
    hidden, head = torch.zeros(0, WIDTH, requires_grad=True), head_of(1)
    none = torch.zeros(0, dtype=torch.int64)
    loss, _ = text_loss(hidden, none, head, Words(), torch.float32)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0 and hidden.grad is not None and hidden.grad.shape == (0, WIDTH)


# --- some of the words ---------------------------------------------------------------------------


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of 50 is large, and few of its words are sampled."""
    monkeypatch.setattr(losses, "ALL_WORDS", 10)
    monkeypatch.setattr(losses, "OTHERS", 9)
    monkeypatch.setattr(losses, "MULTIPLE", 4)


def chosen(named: list[int], seed: int) -> Words:
    return choose_words(torch.tensor(named), WORDS, torch.Generator().manual_seed(seed))


def test_a_small_vocabulary_is_used_whole() -> None:
    words = choose_words(torch.tensor([1, 2]), losses.ALL_WORDS, torch.Generator())
    assert words.ids is None and words.log_weight is None


@pytest.mark.usefixtures("large")
def test_named_words_count_once_and_the_sampled_ones_for_all_others() -> None:
    words = chosen([7, 3, 3, 40], 0)
    assert words.ids is not None and words.log_weight is not None
    weight = dict(zip(words.ids.tolist(), words.log_weight.exp().tolist(), strict=True))
    assert sorted(weight) == list(weight) and {3, 7, 40} <= weight.keys()
    assert all(weight.pop(word) == 1 for word in (3, 7, 40))
    assert len(weight) == 9 and sum(weight.values()) == pytest.approx(47)
    assert words.position(torch.tensor([40, 3])).tolist() == [
        words.ids.tolist().index(40),
        words.ids.tolist().index(3),
    ]


@pytest.mark.usefixtures("large")
def test_steps_look_at_few_different_numbers_of_words() -> None:
    sizes = [len(chosen(list(range(n)), n).ids) for n in range(1, 30)]  # type: ignore[arg-type]
    assert {size % 4 for size in sizes} == {0} and sorted(sizes) == sizes


@pytest.mark.usefixtures("large")
def test_the_loss_is_exact_where_all_words_are_named() -> None:
    hidden, target, head = random(TOKENS, WIDTH, seed=5), random(TOKENS, WIDTH, seed=6), head_of(1)
    teacher, words = head_of(3), chosen(list(range(WORDS)), 0)
    assert words.ids is not None and len(words.ids) == WORDS

    def loss(words: Words) -> Callable[[Tensor, Head], Tensor]:
        def of(hidden: Tensor, head: Head) -> Tensor:
            pair = head.of(words), teacher.of(words)
            return divergence(hidden, target, pair, words, torch.float32)[0]

        return of

    assert_near(ours(hidden, head, loss(words)), ours(hidden, head, loss(Words())))


@pytest.mark.usefixtures("large")
def test_what_sampled_words_stand_for_is_right_on_average() -> None:
    """The softmax's sum, which importance sampling estimates without bias."""
    hidden, head = random(TOKENS, WIDTH, seed=5) / 4, head_of(1)
    named = [7, 3, 40]
    sums = []
    for seed in range(400):
        words = chosen(named, seed)
        assert words.log_weight is not None
        logits = head.of(words).logits(hidden, torch.float32)
        sums.append((logits + words.log_weight).double().exp().sum(-1))
    every = torch.stack(sums)
    exact = head.logits(hidden, torch.float32).double().exp().sum(-1)
    error = every.std(0) / len(sums) ** 0.5
    assert bool(((every.mean(0) - exact).abs() < 4 * error).all())
    assert bool((error < 0.03 * exact).all()), "too noisy to tell"


@pytest.mark.usefixtures("large")
def test_with_sampled_words_the_weight_of_a_head_learns_where_they_are() -> None:
    hidden, weight = random(TOKENS, WIDTH, seed=5), random(WORDS, WIDTH, seed=1).requires_grad_()
    words = chosen([7, 3, 40], 0)
    assert words.ids is not None
    following = torch.tensor([7, 3, 40, 7] * 5 + [3] * 3)
    loss, _ = text_loss(hidden, following, Head(weight).of(words), words, torch.float32)
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert sorted(weight.grad.abs().sum(-1).nonzero().flatten().tolist()) == words.ids.tolist()


# --- what is held --------------------------------------------------------------------------------


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The number of elements of the largest tensor that any operation has made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("whole", [True, False])
def test_nothing_of_the_size_of_tokens_times_words_is_held(whole: bool) -> None:
    tokens, words = 3000, 5000
    hidden = random(tokens, 8).requires_grad_(True)
    head, teacher = Head(random(words, 8, seed=1)), Head(random(words, 8, seed=2))
    target = random(tokens, 8, seed=3)
    with Largest() as spy:
        if whole:
            loss = divergence(hidden, target, (head, teacher), Words(), torch.float32)[0]
        else:
            following = torch.arange(tokens) % words
            loss = text_loss(hidden, following, head, Words(), torch.float32)[0]
        loss.backward()  # type: ignore[no-untyped-call]
    assert spy.largest <= losses._PIECE * words < tokens * words / 10
