"""Synthetic adapters whose answers can be told apart exactly: each makes the model say one word, over and over.

In the last layer the input of down_proj has a direction `a` with a @ x close to 1 at every position (found here by
least squares over a few prompts); B = the word's own row of the output embedding, times a large number, then wins every
position by far. So an answer tells which adapter in which version made it, with no near ties that rounding could
turn. Around that, the adapters are as any other: PEFT folders of rank 4 or 8 on q_proj, v_proj and down_proj.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorauter.adapters.weights import CONFIG_FILE, WEIGHTS_FILE

_CANDIDATES = 2000  # words to choose from
_STRENGTH = 16.0  # of the word's direction, in lengths of the last hidden state
_FAINTEST = 0.5  # of it where the input is least like the direction, and another adapter shares the mixture
_PROMPTS = (
    "The sky is blue and",
    "Translate to English: Zwei Hunde spielen im Schnee.",
    "Short movie review: a joy to watch.\nDid the critic think positively or negatively of the movie?",
    "What kind of thing is described here?\nA large species of dragonfly.",
    "dog dog dog dog dog dog dog dog",
    "table table table table table table",
    " of of of of of of of of",
    " Paris Paris Paris Paris Paris",
)


class WordAdapters:
    """Writes adapters for one base model.

    Args:
        model: the folder of a Llama-shaped model.
        base_model: what adapters call it.

    Attributes:
        words: what adapters can say, each one token, those first that win by most.
    """

    def __init__(self, model: str, base_model: str) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._base_model = base_model
        self._config = source.config
        inputs, outputs = [], []
        last = source.model.layers[-1]
        hooks = [
            last.mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0])),
            source.model.norm.register_forward_pre_hook(lambda _, args: outputs.append(args[0][0])),
        ]
        with torch.no_grad():
            for prompt in _PROMPTS:
                for text in (prompt, _as_chat(tokenizer, prompt)):
                    source(tokenizer(text, return_tensors="pt").input_ids)
        for hook in hooks:
            hook.remove()
        x = torch.cat(inputs)
        moments = x.T @ x / len(x)
        ridge = 0.1 * moments.diagonal().mean() * torch.eye(len(moments))
        self._direction = torch.linalg.solve(moments + ridge, x.mean(0))
        self._embeddings = source.lm_head.weight.detach()
        states = torch.cat(outputs)
        self._length = _STRENGTH * float(states.norm(dim=1).median())
        self._gain = source.model.norm.weight.detach()
        self.words = self._choose(tokenizer, states[:: len(states) // 6])

    def write(self, folder: Path, word: str, *, rank: int) -> None:
        """Write a PEFT folder that makes the model say `word`, one of `words`."""
        folder.mkdir(parents=True, exist_ok=True)
        config = self._config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        outs = {"q_proj": config.num_attention_heads * head, "v_proj": config.num_key_value_heads * head}
        noise = torch.Generator().manual_seed(self._tokens[word])
        tensors = {}
        for layer in range(config.num_hidden_layers):
            for target, out in outs.items():
                key = f"base_model.model.model.layers.{layer}.self_attn.{target}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(rank, config.hidden_size, generator=noise) * 1e-3
                tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=noise) * 1e-3
        a, b = torch.zeros(rank, config.intermediate_size), torch.zeros(config.hidden_size, rank)
        row = self._embeddings[self._tokens[word]]
        a[0], b[:, 0] = self._direction, row / row.norm() * self._length
        key = f"base_model.model.model.layers.{config.num_hidden_layers - 1}.mlp.down_proj"
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
        save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, folder / WEIGHTS_FILE)
        settings = {
            "peft_type": "LORA",
            "base_model_name_or_path": self._base_model,
            "r": rank,
            "lora_alpha": rank,  # scaling 1
            "target_modules": ["q_proj", "v_proj", "down_proj"],
        }
        (folder / CONFIG_FILE).write_text(json.dumps(settings))

    def _choose(self, tokenizer: object, states: torch.Tensor) -> list[str]:
        """Words that are one token and win from each of these (n, hidden) last states, the clearest first."""
        pieces = tokenizer.convert_ids_to_tokens(range(len(self._embeddings)))  # type: ignore[attr-defined]
        self._tokens = {
            piece[1:]: token
            for token, piece in enumerate(pieces)
            if piece and piece[0] == "Ġ" and piece[1:].isascii() and piece[1:].isalpha() and 4 <= len(piece) <= 13
        }
        words = list(self._tokens)[:_CANDIDATES]
        tokens = torch.tensor([self._tokens[word] for word in words])
        rows = self._embeddings[tokens]
        pushes = rows / rows.norm(dim=1, keepdim=True) * self._length * _FAINTEST
        margins = torch.full((len(words),), torch.inf)
        for state in states:
            hidden = state + pushes
            normed = hidden / hidden.pow(2).mean(dim=1, keepdim=True).sqrt() * self._gain
            logits = normed @ self._embeddings.T
            own = logits.gather(1, tokens[:, None])[:, 0]
            logits.scatter_(1, tokens[:, None], -torch.inf)
            margins = margins.minimum(own - logits.amax(dim=1))
        return [words[i] for i in margins.argsort(descending=True).tolist() if margins[i] > 0]


def _as_chat(tokenizer: object, text: str) -> str:
    chat = [{"role": "user", "content": text}]
    rendered: str = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
        chat, add_generation_prompt=True, tokenize=False
    )
    return rendered
