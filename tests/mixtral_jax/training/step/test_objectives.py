"""Losses and their gradients equal torch's: transformers' own, and preferences written by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.model.adapter import Adapter, AdapterConfig, LowRank
from mixtral_jax.training.batch import Batch, PreferenceBatch
from mixtral_jax.training.example import Example
from mixtral_jax.training.step.objectives import divisor
from mixtral_jax.training.step.trainee import Trainee
from mixtral_jax.training.step.training_step import TrainingStep
from tests.support import parity
from tests.support.training import settings

torch = pytest.importorskip("torch", reason="no torch for this Python: see the test extra")
pytestmark = pytest.mark.slow
LENGTH = 12
LOW = AdapterConfig(targets=("q", "down"), rank=2, alpha=3.0)


def row(seed: int, size: int, prompt: int) -> Example:
    """A document of random ids, of which those behind the prompt are learnt."""
    ids = np.random.default_rng(seed).integers(1, 131, size).astype(np.int32)
    return Example(ids, (np.arange(size) >= prompt).astype(np.float32))


def test_the_loss_of_a_mixture_is_that_of_transformers() -> None:
    """Padded rows, and the load balancing loss of all layers together; Trainer's would differ."""
    theirs = parity.huggingface("mixtral")
    ours = parity.twin(theirs)
    examples = [row(0, 12, 5), row(1, 7, 1), row(2, 9, 4), row(3, 4, 2)]
    batch = Batch.packed([[example] for example in examples], LENGTH)
    ids = torch.tensor(batch.tokens, dtype=torch.long)
    mask = torch.tensor(batch.segments, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, example in enumerate(examples):
        learnt = example.weights > 0
        labels[i, : len(learnt)][torch.tensor(learnt)] = torch.tensor(
            example.ids[learnt], dtype=torch.long
        )
    theirs.router_aux_loss_coef = theirs.config.router_aux_loss_coef = 0.3
    out = theirs(input_ids=ids, attention_mask=mask, labels=labels, output_router_logits=True)
    out.loss.backward()

    run = settings(adapter=None, length=LENGTH, micro_batches=2, router_aux_coefficient=0.3)
    trainee = Trainee(ours, None)
    step = TrainingStep(trainee, run)
    trained = trainee.initial(ours, jax.random.key(0))
    gradient, sums = jax.jit(step.gradient)(trained, {}, batch)
    tokens = jnp.asarray(32.0)
    aux = sums.router.aux(sums.router.picks, tokens)
    assert float(aux) == pytest.approx(out.aux_loss.item(), rel=1e-5)
    loss = float(sums.loss) / 20 + 0.3 * float(aux)  # 7 + 6 + 5 + 2 targets
    assert loss == pytest.approx(out.loss.item(), rel=1e-5)
    want = dict(theirs.named_parameters())
    names = {
        "embed.weight": "model.embed_tokens.weight",
        "layers.0.feed_forward.router.weight": "model.layers.0.mlp.gate.weight",
        "layers.2.feed_forward.down.weight": "model.layers.2.mlp.experts.down_proj",
    }
    for our_name, their_name in names.items():
        _assert_close(gradient[our_name], want[their_name].grad)  # type: ignore[call-overload]


def test_preferences_are_learnt_as_torch_does() -> None:
    """-log sigmoid(beta * difference of log-ratios), the reference being the plain model."""
    theirs = parity.huggingface("mistral")
    ours = parity.twin(theirs)
    pairs = [(row(0, 9, 4), row(1, 7, 4)), (row(2, 5, 2), row(3, 12, 2))]
    chosen, rejected = (Batch.packed([[pair[i]] for pair in pairs], LENGTH) for i in range(2))
    run = settings(
        objective="preference", adapter=LOW, rows=2, micro_batches=2, length=LENGTH, beta=0.3
    )
    trainee = Trainee(ours, LOW)
    step = TrainingStep(trainee, run)
    adapter = jax.tree.map(
        lambda low: LowRank(low.a, 0.05 * jax.random.normal(jax.random.key(1), low.b.shape)),
        trainee.initial(ours, jax.random.key(0)),
        is_leaf=lambda node: isinstance(node, LowRank),
    )
    gradient, sums = jax.jit(step.gradient)(
        adapter, trainee.frozen(ours), PreferenceBatch(chosen, rejected)
    )

    low = _torch_adapter(adapter)
    weights = dict(theirs.named_parameters())
    changed = {
        name: weights[name] + 1.5 * (b @ a).reshape(weights[name].shape)
        for name, (a, b) in low.items()
    }

    def log_probability(example: Example, parameters: Any) -> Any:
        ids = torch.tensor(example.ids, dtype=torch.long)[None]
        logits = torch.func.functional_call(theirs, parameters, (ids,)).logits[0, :-1]
        picked = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
        return (picked * torch.tensor(example.weights[1:])).sum()

    margins = []
    for good, bad in pairs:
        ratios = [log_probability(x, changed) - log_probability(x, {}) for x in (good, bad)]
        margins.append(0.3 * (ratios[0] - ratios[1]))
    margin = torch.stack(margins)
    loss = -torch.nn.functional.logsigmoid(margin).mean()
    loss.backward()
    assert float(sums.loss) / 2 == pytest.approx(loss.item(), rel=1e-5)
    # Empty pairs, which fill up an epoch's last step, count for nothing.
    filled = PreferenceBatch(
        *(
            Batch.packed([[pair[i]] for pair in pairs] + [[], []], LENGTH)  # type: ignore[list-item]
            for i in range(2)
        )
    )
    assert float(divisor(filled)) == 2
    more = jax.jit(step.sums)(adapter, trainee.frozen(ours), filled)
    assert float(more.loss) == pytest.approx(loss.item() * 2, rel=1e-5)
    # The margins are differences of sums of about 40, in float32.
    assert float(sums.margin) == pytest.approx(margin.sum().item(), abs=1e-5)
    assert float(sums.preferred) == (margin > 0).sum().item()
    for layer, beside in enumerate(gradient.layers):
        for target, name in (("q", "self_attn.q_proj"), ("down", "mlp.down_proj")):
            a, b = low[f"model.layers.{layer}.{name}.weight"]
            ours_low = getattr(beside, target)
            _assert_close(ours_low.a, a.grad)
            _assert_close(ours_low.b, b.grad)


def _torch_adapter(adapter: Adapter) -> dict[str, tuple[Any, Any]]:
    """The matrices [U I] and [O U] by transformers' names, to be differentiated."""
    pairs = {}
    for layer, beside in enumerate(adapter.layers):
        for low, name in ((beside.q, "self_attn.q_proj"), (beside.down, "mlp.down_proj")):
            assert low is not None
            a = np.array(low.a).reshape(low.a.shape[0], -1)
            b = np.array(low.b).reshape(-1, low.b.shape[-1])
            pairs[f"model.layers.{layer}.{name}.weight"] = tuple(
                torch.tensor(matrix, requires_grad=True) for matrix in (a, b)
            )
    return pairs


def _assert_close(ours: Any, theirs: Any) -> None:
    want = theirs.numpy()
    got = np.asarray(ours).reshape(want.shape)
    assert np.linalg.norm(got - want) < 1e-4 * np.linalg.norm(want)
