import pytest
import torch

from lorauter.engine.sampling import sample

LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.9, -4.0, 1.9])


def shares(temperature, top_p, n=4000):
    """How often each token comes, over evenly spread uniform numbers."""
    uniforms = [(i + 0.5) / n for i in range(n)]
    tokens = sample(LOGITS.repeat(n, 1), [temperature] * n, [top_p] * n, uniforms)
    return tokens.bincount(minlength=len(LOGITS)) / n


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.2])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_tokens_come_as_often_as_they_should(temperature, top_p):
    expected = (LOGITS.double() / temperature).softmax(-1)
    spent = 0.0
    for token in expected.argsort(descending=True):  # nucleus sampling (arXiv 1904.09751), by the book
        if spent >= top_p:
            expected[token] = 0
        spent += float(expected[token])
    torch.testing.assert_close(shares(temperature, top_p), (expected / expected.sum()).float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(0, 1.0), (0, 0.1), (1e-50, 1.0), (1e-6, 1.0), (1, 1e-50), (1, 1e-9)]
)
def test_at_the_limits_the_likeliest_token_comes(temperature, top_p):
    assert shares(temperature, top_p, n=50).tolist() == [0, 1, 0, 0, 0, 0, 0]


def test_no_token_outside_the_nucleus_comes_at_the_ends():
    ends = [0.0, 1 - 2**-53]
    assert sample(LOGITS.repeat(2, 1), [1.0] * 2, [0.6] * 2, ends).tolist() == [1, 6]
    impossible = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    assert sample(impossible, [1.0], [1.0], ends[1:]).tolist() == [2]


def test_a_rows_choice_depends_on_nothing_else_in_the_batch():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(32, 50, generator=draw) * 3
    temperatures = [(0, 0.5, 1.5)[i % 3] for i in range(32)]
    top_ps = [(1.0, 0.7)[i % 2] for i in range(32)]
    uniforms = torch.rand(32, generator=draw).tolist()
    together = sample(logits, temperatures, top_ps, uniforms).tolist()
    alone = [sample(logits[i : i + 1], [temperatures[i]], [top_ps[i]], [uniforms[i]]).item() for i in range(32)]
    assert together == alone
    assert together[::3] == logits.argmax(-1).tolist()[::3]
    assert together != logits.argmax(-1).tolist()
