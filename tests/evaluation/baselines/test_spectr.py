import pytest
import torch

from lorauter.evaluation.baselines import Arrow, SpectR, TokenRouted
from lorauter.evaluation.baselines.routed_step import group_routers


def score(change: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    _, s, vt = torch.linalg.svd(change, full_matrices=False)
    return (s * (vt @ x)).norm()


def test_a_score_is_the_length_of_the_change_in_singular_directions(adapters):
    for weights in adapters:
        for a, b in weights.tensors.values():
            rows = SpectR().rows(a, b)
            assert rows.shape == a.shape
            gram = rows @ rows.T
            assert torch.allclose(gram, gram.diagonal().diag(), atol=1e-5), "the directions are orthogonal"
            assert torch.allclose(gram.diagonal().sqrt(), torch.linalg.svdvals(b @ a)[: len(a)], atol=1e-5)
            x = torch.randn(a.shape[1], 3)
            assert torch.allclose((rows @ x).norm(dim=0), (b @ a @ x).norm(dim=0), atol=1e-5)


@pytest.mark.parametrize("size", [(3, 5, 4), (6, 4, 9), (6, 9, 4)])
def test_ranks_above_the_layers_own_size_are_taken(size):
    rank, inputs, outputs = size
    a, b, x = torch.randn(rank, inputs), torch.randn(outputs, rank), torch.randn(inputs)
    assert torch.allclose((SpectR().rows(a, b) @ x).norm(), (b @ a @ x).norm(), atol=1e-4)


def test_a_tokens_weights_are_the_softmax_of_the_best_lengths(decoder, adapters, naive):
    names = [weights.name for weights in adapters]
    router = group_routers(decoder, adapters, SpectR(2))["down_proj"]
    x = torch.randn(4, 48)
    allowed = torch.ones(4, len(names), dtype=torch.bool)
    allowed[0, 3] = False
    for layer, candidates in ((0, {"all-linear"}), (1, {"all-linear", "last-layer"})):
        got = router.weights(layer, x, allowed)
        for i in range(4):
            wanted = naive.weights(layer, "down_proj", x[i], names if i else names[:3] + names[4:], score, 2)
            assert set(wanted) == candidates - ({"all-linear"} if not i else set())
            assert torch.allclose(got[i, 0], torch.tensor([float(wanted.get(n, 0)) for n in names]), atol=1e-5)


def test_answers_are_those_of_the_definition(decoder, adapters, naive, prompts):
    names = [weights.name for weights in adapters]
    allowed = torch.ones(len(prompts), len(names), dtype=torch.bool)
    allowed[0, 1] = False
    got = TokenRouted(decoder, adapters, SpectR(2), max_batch=2).generate(prompts, allowed, 6)
    for prompt, may, answer in zip(prompts, allowed, got, strict=True):
        candidates = [name for name, allow in zip(names, may, strict=True) if allow]
        assert answer == naive.continued(prompt, 6, candidates, score, 2)
    assert got != TokenRouted(decoder, adapters, Arrow(2)).generate(prompts, allowed, 6)
