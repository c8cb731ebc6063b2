"""GPT-2, a Transformer that writes text (Radford et al., 2019, "Language Models are Unsupervised
Multitask Learners"; the Transformer is Vaswani et al., 2017, arXiv:1706.03762).

    A text is a sequence of tokens x_1, ..., x_T: words, parts of words, or characters. The model
    gives the probability of each, given those before it:

    p(x_1, ..., x_T) = prod_t p(x_t | x_1, ..., x_{t-1})

    It is trained by minimising the mean of -log p(x_t | x_1, ..., x_{t-1}), the cross-entropy in
    nats per token, and writes by drawing x_t from that distribution again and again.

    python gpt.py train                  train a small one from nothing, on tiny Shakespeare
    python gpt.py train --init gpt2 --text my.txt
                                         go on training OpenAI's GPT-2, on a text of yours
    torchrun --nproc-per-node=8 gpt.py train --text my.txt --tokenizer gpt2 --size gpt2
                                         train one of its size from nothing, on eight GPUs
    python gpt.py generate --prompt "Yesterday I went to the" --num-samples 10
                                         what OpenAI's GPT-2 makes of it, ten times
    python gpt.py generate --model gpt2-xl --greedy --prompt "The capital of France is"
                                         a larger model, and always its most probable token
    python gpt.py generate --model DIR --prompt - < prompt.txt
                                         weights from a folder or a run, a prompt from a file

OpenAI's weights are downloaded once, into torch's own cache. A run leaves in its folder, such as
runs/gpt-tinyshakespeare: args.json, metrics.jsonl (one row an evaluation), last.pt (to resume
from), best.pt (to generate with), sample_step_....txt, loss.png, test.json (the best figures in
validation) and GPT-2's tokenizer where it is used; and beside that folder the text as tokens, in
tokens-....bin, for the next run.

The assignment is the University of Amsterdam's Deep Learning Practical 3 (2023); "Equation" and
"Q" (question) refer to it. In the comments on shapes B is the batch size, T the number of tokens
in a sequence, S that of the tokens which they may look at, C the size of a token's embedding, H the
number of attention heads and V that of tokens in the vocabulary.
"""

import argparse
import codecs
import contextlib
import dataclasses
import functools
import hashlib
import heapq
import io
import itertools
import json
import math
import mmap
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
import time
import unicodedata
import urllib.request
import zipfile
from collections import defaultdict
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common

# ---------------------------------------------------------------------------------------------
# The network


@dataclasses.dataclass
class GPTConfig:
    vocab_size: int  # V
    block_size: int  # the longest sequence, in tokens
    n_layer: int
    n_head: int  # H
    n_embd: int  # C
    dropout: float = 0.0
    fused: bool = True  # attention by torch's fused kernel, not by attention() below

    def __post_init__(self):
        sizes = (self.vocab_size, self.block_size, self.n_layer, self.n_head, self.n_embd)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"the sizes {sizes} are not all whole numbers above 0")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")


SIZES = {  # n_layer, n_head, n_embd: of OpenAI, Gopher, nanoGPT and minGPT
    "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600), "gopher-44m": (8, 16, 512), "gpt-baby": (6, 6, 384),
    "gpt-mini": (6, 6, 192), "gpt-micro": (4, 4, 128), "gpt-nano": (3, 3, 48),
}


def attention(q, k, v, mask, dropout_p=0.0):
    """Scaled dot-product attention, softmax(q k^T / sqrt(C / H)) v (Equation 22; Q3.2).

    q: [B, H, T, C / H]; k and v: [B, H, S, C / H]; mask: boolean [T, S], True where a query may
    look. -> [B, H, T, C / H]
    """
    q = q / math.sqrt(q.size(-1))  # before the product, which could overflow in float16
    scores = q @ k.transpose(-2, -1)  # [B, H, T, S]
    scores = scores.masked_fill(~mask, -math.inf)
    weights = F.softmax(scores, dim=-1)
    weights = F.dropout(weights, dropout_p)
    return weights @ v


def linear(x, weight, bias=None):
    """F.linear, [..., n_in] -> [..., n_out]. In generation on a CPU it takes all threads.

    torch multiplies a matrix by a vector on one thread, and a batch of matrices on all of them. So
    the rows of `weight` are taken in groups, as a batch: on 4 threads, 768 -> 2304 for N vectors
    becomes [4, 576, 768] @ [4, 768, N]. In float32 that is up to twice as fast for a few vectors.
    """
    n_out, n_in = weight.shape
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.numel() > 32 * n_in:
        return F.linear(x, weight, bias)
    groups = min(torch.get_num_threads(), n_out)
    while n_out % groups:  # up to the next number that divides n_out
        groups += 1
    columns = x.reshape(-1, n_in).t().expand(groups, n_in, -1)  # [groups, n_in, N]
    weight = weight.view(groups, -1, n_in)  # [groups, n_out / groups, n_in]
    if bias is None:
        y = torch.bmm(weight, columns)  # [groups, n_out / groups, N]
    else:
        y = torch.baddbmm(bias.view(groups, -1, 1), weight, columns)
    return y.view(n_out, -1).t().contiguous().view(*x.shape[:-1], n_out)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention: position t looks at the positions up to t."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.fused = config.n_head, config.fused
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, start=0):
        """x: [B, T, C] -> [B, T, C]

        cache: [2, B, H, room, C / H], with the keys and values of the first `start` positions, to
        which those of x are added. It works without gradients only, and x is then a whole prompt
        (start = 0) or one position (T = 1).
        """
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # [3, B, H, T, C / H]
        q, k, v = qkv
        if cache is not None:
            assert start + T <= cache.size(3) and (start == 0 or T == 1)
            cache[:, :, :, start:start + T] = qkv[1:]
            k, v = cache[:, :, :, :start + T]  # [B, H, S, C / H]
        dropout_p = self.dropout.p if self.training else 0.0
        if self.fused:
            # A single query is the last position, and may look at all.
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=T > 1)
        else:
            S = k.size(2)
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
            y = attention(q, k, v, mask, dropout_p)
        y = y.transpose(1, 2).flatten(2)  # [B, T, C]
        return self.dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # [B, T, 4 C]
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, start=0):
        x = x + self.attn(self.ln_1(x), cache, start)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Parameters are named as in the public GPT-2 checkpoints, which hold the matrices of Linear
    transposed. The output head has none of its own: it is `wte`, the embedding of the tokens."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # nn.Embedding(...) would draw values, for which the "meta" device takes seconds.
        wte = torch.empty(config.vocab_size, config.n_embd)
        wpe = torch.empty(config.block_size, config.n_embd)
        self.wte = nn.Embedding.from_pretrained(wte, freeze=False)
        self.wpe = nn.Embedding.from_pretrained(wpe, freeze=False)
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        if not wte.is_meta:  # tensors on "meta" have shapes, and no values
            self.init_weights()

    def init_weights(self):
        """Normal, as in OpenAI's code; the matrices that end the 2 n_layer residual branches are
        divided by sqrt(2 n_layer), as in the paper."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = 0.01 if name == "wpe.weight" else 0.02
                if name.endswith("c_proj.weight"):
                    std /= math.sqrt(2 * self.config.n_layer)
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)

    def hidden(self, idx, cache=None, start=0):
        """From tokens idx [B, T], the first of which is at position `start`, through all layers
        and the last LayerNorm. -> [B, T, C]. `cache`: CausalSelfAttention's of all layers."""
        T, block_size = idx.size(1), self.config.block_size
        assert 0 < start + T <= block_size, f"{start + T} tokens, of at most {block_size}"
        x = self.wte(idx) + self.wpe.weight[start:start + T]  # [B, T, C]
        x = self.dropout(x)
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[i], start)
        return self.ln_f(x)

    def forward(self, idx, targets=None):
        """idx: tokens [B, T] -> logits [B, T, V] of the tokens that follow each of them, and the
        loss: their mean cross-entropy with `targets` [B, T], in nats per token, or None."""
        logits = linear(self.hidden(idx), self.wte.weight)
        if targets is None:
            return logits, None
        # In float32 at least: in bfloat16 the loss itself is rounded, by up to 0.1 nats.
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits, F.cross_entropy(precise.flatten(0, 1), targets.flatten())

    def generate(self, idx, max_new_tokens, *, do_sample=True, temperature=1.0, top_k=None,
                 top_p=None, stop_token=None, generator=None, use_cache=True):
        """Continue idx [B, T], of which the model sees the last block_size tokens.

        See `next_token` for how tokens are chosen. After `stop_token` a row holds nothing else.
        Without use_cache the whole sequence is computed again for each token; the result is the
        same. -> [B, T + max_new_tokens]
        """
        choose = functools.partial(next_token, do_sample=do_sample, temperature=temperature,
                                   top_k=top_k, top_p=top_p, generator=generator)
        training = self.training
        self.eval()
        try:
            new = self.stream(idx, max_new_tokens, choose, stop_token, use_cache)
            tokens = torch.cat([idx, *new], dim=1)
        finally:
            self.train(training)
        missing = idx.size(1) + max_new_tokens - tokens.size(1)
        return F.pad(tokens, (0, missing), value=stop_token)

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, choose, stop_token=None, use_cache=True):
        """Yield the tokens [B, 1] that continue idx [B, T], as they are made, of a model in
        evaluation mode.

        choose: a function from logits [B, V] to tokens [B, 1]. The stream ends early once each
        row has come to `stop_token`.
        """
        (B, T), config = idx.shape, self.config
        assert T > 0 and max_new_tokens >= 0 and not self.training
        if use_cache:
            cache = torch.empty(  # keys and values
                config.n_layer, 2, B, config.n_head, min(T + max_new_tokens, config.block_size),
                config.n_embd // config.n_head, dtype=self.wte.weight.dtype, device=idx.device)
        stopped = torch.zeros(B, 1, dtype=torch.bool, device=idx.device)
        for length in range(T, T + max_new_tokens):
            if use_cache and length <= config.block_size:
                start = 0 if length == T else length - 1  # the whole prompt, then the last token
                x = self.hidden(idx[:, start:], cache, start)
            else:
                # In a window that slides each token has a new position, so a new embedding: no
                # key and no value of the window before it still holds, in any layer.
                x = self.hidden(idx[:, -config.block_size:])
            token = choose(linear(x[:, -1], self.wte.weight))
            if stop_token is not None:
                token = token.masked_fill(stopped, stop_token)
                stopped = token == stop_token
            yield token
            if stop_token is not None and stopped.all():
                return
            idx = torch.cat([idx, token], dim=1)

    @classmethod
    def from_pretrained(cls, name_or_path, dropout=0.0):
        """A trained model, in evaluation mode, float32 and on the CPU.

        name_or_path: one of PRETRAINED, which is downloaded once; or a folder that holds
        config.json with model.safetensors or pytorch_model.bin, or one such file beside its
        config.json; or the folder of a run of this script. dropout: for training it further.

        Raises ConnectionError where a download fails, FileNotFoundError for files that are not
        there, and ValueError for files that are damaged or hold another model than this one.
        """
        path = find_weights(name_or_path)
        config, weights = read_weights(path)
        config.dropout = dropout
        with torch.device("meta"):  # shapes without memory
            model = cls(config)
        ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        theirs = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if wrong := sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name)):
            raise ValueError(f"{path} does not hold this model: " + ", ".join(
                f"{name} {theirs.get(name, 'missing')} for {ours.get(name, 'none')}"
                for name in wrong))
        model.to_empty(device="cpu")
        model.load_state_dict(weights)
        return model.eval()

    def crop(self, block_size):
        """Keep the first `block_size` positions alone. Raises ValueError where there are fewer."""
        if block_size > self.config.block_size:
            raise ValueError(f"the model was trained for blocks of at most "
                             f"{self.config.block_size:,} tokens, not of {block_size:,}")
        wpe = self.wpe.weight[:block_size].detach().clone()
        self.wpe = nn.Embedding.from_pretrained(wpe, freeze=False)
        self.config.block_size = block_size


def next_token(logits, do_sample=True, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Choose the next token of each row (Q3.3). logits [B, V] -> tokens [B, 1]

    Without do_sample, or at temperature 0, it is the most probable. Else it is drawn from
    softmax(logits / temperature), restricted to
    - the top_k most probable tokens (None or 0: all), and of these
    - the fewest, the most probable first, that make up a share of at least top_p (None or 1: all;
      0: the first; Holtzman et al., 2020, arXiv:1904.09751).
    """
    assert temperature >= 0
    if not do_sample or temperature < 1e-6:  # 0, or as good as 0
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    nucleus = top_p is not None and top_p < 1
    if top_k or nucleus:
        V = logits.size(-1)
        top, ids = logits.topk(min(top_k or V, V))  # the most probable first
        if nucleus:
            mass = F.softmax(top, dim=-1).cumsum(dim=-1)
            top[:, 1:][mass[:, :-1] >= top_p] = -math.inf  # the first always stays
        logits = torch.full_like(logits, -math.inf).scatter(-1, ids, top)
    probs = F.softmax(logits, dim=-1)
    if probs.device.type == "mps":  # its multinomial has drawn wrongly for years
        return torch.multinomial(probs.cpu(), 1, generator=generator).to(probs.device)
    return torch.multinomial(probs, 1, generator=generator)


# ---------------------------------------------------------------------------------------------
# Tokenizers

END_OF_TEXT = "<|endoftext|>"
# Unicode's \s. That of Python's re has four control characters more.
WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


@functools.cache
def word_pattern():
    r"""How GPT-2 splits a text into words, numbers, other characters and white space:

    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

    with Unicode's letters, \p{L}, and numbers, \p{N}, written out, as Python's re has neither.
    """
    classes = defaultdict(str)
    characters = map(chr, range(sys.maxunicode + 1))
    for kind, run in itertools.groupby(characters, lambda c: unicodedata.category(c)[0]):
        run = list(run)
        classes[kind] += f"{re.escape(run[0])}-{re.escape(run[-1])}"
    letter, number, space = classes["L"], classes["N"], WHITE_SPACE
    return re.compile(f"'(?:[sdmt]|ll|ve|re)| ?[{letter}]+| ?[{number}]+"
                      f"| ?[^{space}{letter}{number}]+|[{space}]+(?![^{space}])|[{space}]+")


class BPETokenizer:
    """GPT-2's byte-level byte-pair encoding (Sennrich et al., 2016, arXiv:1508.07909).

    A text is split into words, and a word into its UTF-8 bytes, a token each. Then, again and
    again, two tokens side by side become one: the pair that stands earliest in a list of 50,000,
    and where it occurs twice, the left one.

    vocab_file, merges_file: the paths of GPT-2's vocab.json and merges.txt. Raises ValueError
    where they do not belong together, and OSError where they cannot be read.
    """

    def __init__(self, vocab_file, merges_file):
        self.files = (Path(vocab_file), Path(merges_file))
        # The files write a byte as a character that can be seen: its own, or one past U+00FF.
        visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
        others = itertools.count(256)
        alphabet = [chr(b if b in visible else next(others)) for b in range(256)]
        byte_of = {character: byte for byte, character in enumerate(alphabet)}
        try:
            vocab = json.loads(Path(vocab_file).read_text(encoding="utf-8"))
            if sorted(vocab.values()) != [*range(len(vocab))]:
                raise ValueError("the ids are not 0, 1, 2, ...")
            self.bytes_of = {id: bytes(byte_of[c] for c in token) for token, id in vocab.items()}
            self.byte_ids = [vocab[character] for character in alphabet]
            self.merges = []  # (left, right, both together), as ids
            for line in Path(merges_file).read_text(encoding="utf-8").split("\n"):
                if line and not line.startswith("#version"):
                    left, right = line.split(" ")
                    self.merges.append((vocab[left], vocab[right], vocab[left + right]))
            made = {*self.byte_ids, *(merged for _, _, merged in self.merges)}
            for token, id in vocab.items():
                if id not in made and token[0] + token[-1] != "<>":  # as in <|endoftext|>
                    raise ValueError(f"no merge makes {token!r}")
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{vocab_file} and {merges_file} are damaged or do not belong "
                             f"together ({type(error).__name__}: {error})") from error
        self.ranks = {(left, right): rank for rank, (left, right, _) in enumerate(self.merges)}
        self.end_of_text = vocab.get(END_OF_TEXT)
        self.start = vocab.get(END_OF_TEXT, 0)  # what a text without a prompt starts from
        self.word_ids = functools.lru_cache(maxsize=2**16)(self._merge)

    def __len__(self):
        return len(self.bytes_of)

    def num_bytes(self, id):
        return len(self.bytes_of[id])

    def _merge(self, word):
        """The ids of one word, in a time that grows little faster than its length."""
        ids = [self.byte_ids[byte] for byte in word.encode("utf-8")]
        before, after = list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1))  # neighbours
        pairs = enumerate(itertools.pairwise(ids))
        queue = [(self.ranks[pair], i) for i, pair in pairs if pair in self.ranks]
        heapq.heapify(queue)
        while queue:
            rank, i = heapq.heappop(queue)
            left, right, merged = self.merges[rank]
            j = after[i]
            if ids[i] != left or j == len(ids) or ids[j] != right:
                continue  # one of the two has been merged since
            ids[i], ids[j], after[i] = merged, None, after[j]
            h, k = before[i], after[i]
            if h >= 0 and (rank := self.ranks.get((ids[h], merged))) is not None:
                heapq.heappush(queue, (rank, h))
            if k < len(ids):
                before[k] = i
                if (rank := self.ranks.get((merged, ids[k]))) is not None:
                    heapq.heappush(queue, (rank, i))
        return [id for id in ids if id is not None]

    def encode(self, text, special=False):
        """text -> list of ids. `<|endoftext|>` is text like any other, or with `special` the one
        token of that name (ValueError if there is none). Half a surrogate pair counts as U+FFFD."""
        if special and self.end_of_text is None:
            raise ValueError(f"the vocabulary has no {END_OF_TEXT}")
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = []
        for i, part in enumerate(text.split(END_OF_TEXT) if special else [text]):
            if i > 0:
                ids.append(self.end_of_text)
            for word in word_pattern().findall(part):
                ids += self.word_ids(word)
        return ids

    def stream(self, ids):
        """Yield the text of each of `ids` as it comes; what is only part of a character waits for
        the rest of it. What is no UTF-8, or no id, becomes U+FFFD."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for id in ids:
            yield decoder.decode(self.bytes_of.get(int(id), b"\xff"))
        yield decoder.decode(b"", final=True)

    def decode(self, ids):
        """list of ids -> text"""
        return "".join(self.stream(ids))


class CharTokenizer:
    """A token for each character of the string `characters`."""

    end_of_text = None

    def __init__(self, characters):
        self.characters = characters
        self.ids = {character: id for id, character in enumerate(characters)}
        self.start = self.ids.get("\n", 0)  # what a text without a prompt starts from

    def __len__(self):
        return len(self.characters)

    def num_bytes(self, id):
        return len(self.characters[id].encode("utf-8"))

    def encode(self, text):
        """text -> list of ids. Raises ValueError for characters that are not among them."""
        if unknown := set(text) - self.ids.keys():
            raise ValueError(f"the model never saw {''.join(sorted(unknown))!r}, and has no token "
                             "for it")
        return [self.ids[character] for character in text]

    def stream(self, ids):
        """Yield the character of each of `ids` as it comes; U+FFFD for what is no id."""
        for id in ids:
            yield self.characters[int(id)] if 0 <= id < len(self.characters) else "\ufffd"

    def decode(self, ids):
        """list of ids -> text"""
        return "".join(self.stream(ids))


# ---------------------------------------------------------------------------------------------
# Pretrained weights

PRETRAINED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB = "https://huggingface.co/openai-community"
TOKENIZER_FILES = ("vocab.json", "merges.txt")
# Settings of a config.json that change what a model computes, and their values that are
# implemented here; the first is what a setting that is left out stands for.
IMPLEMENTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the same
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}

DTYPES = {  # as safetensors names them
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}


def find_weights(name_or_path):
    """-> the path of a file of weights, after downloading it if it is one of PRETRAINED"""
    if name_or_path in PRETRAINED:
        folder = download(name_or_path, "config.json", *TOKENIZER_FILES, "model.safetensors")
        return folder / "model.safetensors"
    path = Path(name_or_path)
    names = ("model.safetensors", "pytorch_model.bin", "best.pt", "last.pt")
    if path.is_dir():
        path = next((path / name for name in names if (path / name).exists()), path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is neither {', '.join(PRETRAINED)} nor a file of weights "
                                f"nor a folder with one: {', '.join(names)}")
    return path


def fetch(url, path):
    """Download a file, whole or not at all.

    Raises ConnectionError where that fails, after 15 seconds without an answer.
    """
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(15)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"{url} -> {path}", file=sys.stderr)
        part = path.with_name(f"{path.name}.part")
        torch.hub.download_url_to_file(url, part, progress=sys.stderr.isatty())
        with urllib.request.urlopen(url) as response:  # torch compares no length
            if response.length not in (None, part.stat().st_size):
                raise ConnectionError("it broke off")
        part.replace(path)
    except (OSError, HTTPException, ValueError) as error:
        raise ConnectionError(f"{path.name} is not in {path.parent} and could not be downloaded "
                              f"({error}): run once online, or put it there") from error
    finally:
        socket.setdefaulttimeout(timeout)


def download(name, *files):
    """-> the folder in torch's cache with these files of one of PRETRAINED"""
    folder = Path(torch.hub.get_dir(), "checkpoints", name)
    for file in files:
        if not (folder / file).exists():
            fetch(f"{HUB}/{name}/resolve/main/{file}", folder / file)
    return folder


def read_config(path):
    """config.json -> GPTConfig. Raises ValueError for a model that this file cannot compute."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        for setting, values in IMPLEMENTED.items():
            if config.get(setting, values[0]) not in values:
                raise ValueError(f"its {setting} is {config[setting]!r}, and gpt.py computes only "
                                 f"{values[0]!r}")
        return GPTConfig(config["vocab_size"], config["n_positions"], config["n_layer"],
                         config["n_head"], config["n_embd"])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is not there: put it beside the weights") from error
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} describes no GPT-2 ({reason})") from error


def read_tensors(path):
    """-> what a file of weights holds; tensors stay in the file until they are used"""
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        is_zip = zipfile.is_zipfile(path)  # torch 1.6 and later; else it cannot be mapped
        if is_zip and (damaged := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"in {damaged}")
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        if not isinstance(saved, dict) or not all(isinstance(name, str) for name in saved):
            raise ValueError("no tensors by name")
        return saved
    except OSError:
        raise
    except Exception as error:  # of many kinds, where a file is not what its name says
        reason = f"{type(error).__name__}: {error}".split("\n")[0].split(". ")[0]
        raise ValueError(f"{path} is damaged or holds no weights ({reason}): put a sound copy in "
                         "its place") from error


def read_safetensors(path):
    """8 bytes with the length of the header, the header in JSON, and the tensors end to end."""
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    data_start = 8 + int.from_bytes(memory[:8], "little")
    header = json.loads(memory[8:data_start])
    header.pop("__metadata__", None)
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (start, stop), shape = entry["data_offsets"], entry["shape"]
        tensors[name] = torch.frombuffer(memory, dtype=DTYPES[entry["dtype"]],
                                         count=math.prod(shape), offset=data_start + start)
        tensors[name] = tensors[name].view(shape)
        if start != end or tensors[name].nbytes != stop - start:
            raise ValueError(f"{name} is out of place")
        end = stop
    if data_start + end != len(memory):
        raise ValueError(f"{len(memory):,} bytes for {data_start + end:,}")
    return tensors


def read_weights(path):
    """-> GPTConfig and the weights by name, from one of the files that find_weights finds"""
    if path.suffix == ".pt":
        saved = read_tensors(path)
        try:
            return GPTConfig(**saved["config"]), dict(saved["model"])
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path} was not written by gpt.py") from error
    config, weights = read_config(path.with_name("config.json")), {}
    for name, tensor in read_tensors(path).items():
        name = name.removeprefix("transformer.")
        if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):
            continue  # the causal mask, and what it is filled with
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} is no tensor of floating-point numbers")
        if name in weights:
            raise ValueError(f"{path} holds {name} twice")
        transposed = ".c_" in name and name.endswith(".weight")  # [in, out] in these files
        weights[name] = tensor.transpose(0, -1) if transposed else tensor
    head = weights.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, weights.setdefault("wte.weight", head)):
        raise ValueError(f"{path}: lm_head.weight differs from wte.weight, and gpt.py computes "
                         "with one for both")
    return config, weights


def load_tokenizer(name_or_path):
    """The tokenizer of the model that GPT.from_pretrained loads from the same place."""
    path = find_weights(name_or_path)
    if path.suffix == ".pt" and (characters := read_tensors(path).get("characters")):
        return CharTokenizer(characters)
    files = [path.with_name(name) for name in TOKENIZER_FILES]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file} is not there: put GPT-2's beside the weights")
    return BPETokenizer(*files)


# ---------------------------------------------------------------------------------------------
# Arguments, stops, seeds and small files


def integer(minimum):
    """An argparse type: an integer of at least `minimum`."""

    def parse(text):
        if not minimum <= (value := int(text)) < 2**63:
            raise argparse.ArgumentTypeError(f"{value} is out of range (from {minimum})")
        return value

    parse.__name__ = "integer"  # argparse says "invalid integer value: 'two'"
    return parse


def positive(text):
    """An argparse type: a finite number above 0."""
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def number(minimum, maximum=float("inf")):
    """An argparse type: a finite number from `minimum` to `maximum`, both of which it may be."""

    def parse(text):
        if not minimum <= (value := float(text)) <= maximum or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not between {minimum} and {maximum}")
        return value

    parse.__name__ = "number"  # argparse says "invalid number value: 'two'"
    return parse


def parse_run_args(parser, argv, run_args):
    """parser.parse_args(argv) over `run_args`, the arguments of a run that goes on or is looked
    at again: beside --resume or --eval only --device, --data-dir and --text may be given."""
    argv = sys.argv[1:] if argv is None else argv
    run_args = argparse.Namespace(**run_args | {"resume": None, "eval": None}) if run_args else None
    args = parser.parse_args(argv, run_args)
    given = [word.split("=")[0] for word in argv if word.startswith("--")]
    for flag in {"--resume", "--eval"}.intersection(given):
        if others := set(given) - {flag, "--device", "--data-dir", "--text"}:
            parser.error(f"{flag} keeps the run's own arguments: leave out {' '.join(others)}")
    return args


class StopRequest:
    """Within the `with` block Ctrl-C and SIGTERM only set `asked`, which the loop reads after
    each step; a second Ctrl-C acts at once."""

    def __enter__(self):
        self.asked = False
        self.previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, signum, frame):
        self.asked = True
        self.__exit__()

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def seed_for(*numbers):
    """A seed of its own for numbers such as (seed, step); zeros at their end do not count. With
    their sum, seed 1 would see at step 0 what seed 0 sees at step 1."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_step(device, *numbers):
    """Start the random numbers of `device` anew, from seed_for(*numbers)."""
    if device.type == "cpu":  # torch.manual_seed takes 0.4 ms to note it for absent devices, too
        torch.default_generator.manual_seed(seed_for(*numbers))
    else:
        torch.manual_seed(seed_for(*numbers))


def write_text(path, text):
    """Write a whole file or none: to a temporary name, then moved over the old one."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_metrics(folder, rows):
    """metrics.jsonl: one row an epoch or evaluation."""
    write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------------------------------------
# The text, and the processes that share it

SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt")
STAND_IN = "python-topics.txt"
PIECE = 2**20  # how many characters are read at a time


class Text(NamedTuple):
    path: Path
    length: int  # in characters
    characters: str  # the different ones
    digest: str  # SHA-256


def process():
    """-> the rank of this process and how many there are: (0, 1) but under torchrun"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def add_up(tensor):
    """Replace `tensor` by its sum over all processes, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def find_text(data_dir, stand_in):
    """-> the path of tiny Shakespeare, which is downloaded where it is not in `data_dir`

    Where that fails, it is the path of Python's documentation of itself, or without `stand_in`
    a ConnectionError.
    """
    path = Path(data_dir, "tinyshakespeare.txt")
    try:
        if not path.exists():
            fetch(SHAKESPEARE, path)
    except ConnectionError as error:
        if not stand_in:
            raise
        from pydoc_data.topics import topics

        print(f"warning: {error}; this run learns Python's documentation", file=sys.stderr)
        path = path.with_name(STAND_IN)
        if not path.exists():
            write_text(path, "\n".join(topics.values()))
    return path


def pieces(file, length, title):
    """Yield the next `length` characters of a text file, a piece at a time.

    The tokens of the pieces are those of the whole, as each piece ends before white space that
    follows something else: within no token is there white space after anything else. (Where there
    is no such place, a piece grows.)
    """
    before_space = re.compile(f".*[^{WHITE_SPACE}](?=[{WHITE_SPACE}])", re.DOTALL)
    rest = ""
    with tqdm(desc=title, unit=" characters", unit_scale=True, delay=1, leave=False,
              disable=process()[0] > 0 or None) as bar:
        while new := file.read(min(length, PIECE)):
            bar.update(len(new))
            length -= len(new)
            piece = rest + new
            match = before_space.match(piece)
            end = match.end() if match else 0
            yield piece[:end]
            rest = piece[end:]
    yield rest


def read_text(path, limit):
    """The first `limit` characters of a file, or with None all of them. -> Text

    Raises UserError where there are none, and for what is no UTF-8.
    """
    if not path.is_file():
        raise common.UserError(f"{path} is no file: pass that of a UTF-8 text as --text")
    length, characters, digest = 0, set(), hashlib.sha256()
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for piece in pieces(file, limit or sys.maxsize, "reading"):
                length += len(piece)
                characters.update(piece)
                digest.update(piece.encode("utf-8"))
    except UnicodeDecodeError as error:
        raise common.UserError(f"{path} is no UTF-8 text ({error}): convert it") from error
    if length == 0:
        raise common.UserError(f"{path} is empty: there is nothing to learn from")
    return Text(path, length, "".join(sorted(characters)), digest.hexdigest())


def tokenize(text, tokenizer, folder, block_size):
    """The tokens of the first 90% of a text, to train on, and of the rest, to validate. They are
    kept in two files in `folder`, made once for each text and tokenizer. -> two memory maps

    Raises UserError where there are not enough for one block, and ValueError for a character that
    the tokenizer does not know.
    """
    if isinstance(tokenizer, CharTokenizer):
        encode, definition = tokenizer.encode, tokenizer.characters.encode("utf-8")
    else:
        encode = functools.partial(tokenizer.encode, special=tokenizer.end_of_text is not None)
        definition = b"".join(file.read_bytes() for file in tokenizer.files)
    key = hashlib.sha256(text.digest.encode("ascii") + definition).hexdigest()[:16]
    files = [folder / f"tokens-{key}-{part}.bin" for part in ("train", "val")]
    train_length = int(0.9 * text.length)
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32

    def check(sources):
        train, val = (source.stat().st_size // dtype().itemsize for source in sources)
        if train <= block_size or val < 2:
            raise common.UserError(f"{text.path} is too short: it has {train:,} tokens to train on "
                                   f"and {val:,} to validate, and needs more than {block_size:,} "
                                   "(--block-size) and 1")

    if not all(file.exists() for file in files):
        near = next(path for path in files[0].absolute().parents if path.is_dir())
        with tempfile.TemporaryDirectory(prefix="tokens-", dir=near) as temporary, \
                open(text.path, encoding="utf-8", newline="") as source:
            made = [Path(temporary, file.name) for file in files]
            for part, length in zip(made, (train_length, text.length - train_length), strict=True):
                with open(part, "wb") as target:
                    for piece in pieces(source, length, "tokenizing"):
                        target.write(np.array(encode(piece), dtype))
            check(made)
            folder.mkdir(parents=True, exist_ok=True)
            for part, file in zip(made, files, strict=True):
                os.replace(part, file)
    check(files)
    return [np.memmap(file, dtype, "r") for file in files]


def random_windows(tokens, number, block_size, seed, step):
    """What a step learns from, however many processes share it: windows that begin anywhere in
    `tokens`. -> [number, block_size + 1]"""
    generator = torch.Generator().manual_seed(seed_for(seed, step))
    starts = torch.randint(len(tokens) - block_size, (number, 1), generator=generator)
    windows = tokens[starts.numpy() + np.arange(block_size + 1)]
    return torch.from_numpy(windows.astype(np.int64))


# ---------------------------------------------------------------------------------------------
# Training


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are made orthogonal, so that a matrix learns in all directions alike
    (Jordan et al., 2024, kellerjordan.github.io/posts/muon), and as large as Adam's are, so that
    it takes the same learning rates (Liu et al., 2025, arXiv:2502.16982).

    torch.optim.Muon computes in bfloat16: 20 times as long on the many CPUs that only emulate it.
    """

    def __init__(self, matrices, lr, weight_decay, momentum=0.95):
        shapes = {p.shape: [q for q in matrices if q.shape == p.shape] for p in matrices}
        super().__init__([{"params": group} for group in shapes.values()],
                         {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:  # all matrices of one shape
            lr, momentum, weights = group["lr"], group["momentum"], group["params"]
            gradients = torch.stack([weight.grad for weight in weights])  # [n, rows, columns]
            state = self.state[weights[0]]
            if not state:
                state["mean"] = torch.zeros_like(gradients)
            state["mean"].lerp_(gradients, 1 - momentum)
            updates = orthogonalize(gradients.lerp(state["mean"], momentum))
            scale = 0.2 * math.sqrt(max(weights[0].shape))
            for weight, update in zip(weights, updates, strict=True):
                weight.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr * scale)


def orthogonalize(matrices):
    """U V^T, nearly, for each matrix U S V^T of [n, rows, columns]: the five steps (Newton and
    Schulz's iteration, Jordan's coefficients) leave the singular vectors as they are, and bring
    most singular values to between 0.7 and 1.2."""
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x  # [n, less, more], so that the products below are small
    identity = torch.eye(x.size(1), device=x.device, dtype=x.dtype)
    for _ in range(5):
        xx = x @ x.mT  # [n, less, less]
        x = (3.4445 * identity - 4.7750 * xx + 2.0315 * xx @ xx) @ x
    return x.mT if tall else x


def learning_rate(step, args):
    """Up to --lr in the first --warmup steps, then by a cosine down to --min-lr."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / (args.max_steps - args.warmup)  # from 0 to almost 1
    return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def flops_per_token(model):
    """Of a training step: 6 for each parameter but wpe (2 forward, 4 backward), and 12 T C for each
    layer's attention (Chowdhery et al., 2022, arXiv:2204.02311, Appendix B)."""
    weights = sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()
    config = model.config
    return 6 * weights + 12 * config.n_layer * config.block_size * config.n_embd


def matrix_rate(device, dtype):
    """How many floating-point operations per second a product of large matrices comes to here, of
    which training's share is its model-FLOPs utilisation (MFU)."""
    n = 1024 if device.type == "cpu" else 8192
    x = torch.randn(n, n, dtype=dtype, device=device)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        (x @ x)[0, 0].item()  # to read a value is to wait for it
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)


@torch.no_grad()
def evaluate(model, tokens, tokenizer, batch_size, dtype):
    """One pass over `tokens`, in windows of block_size, each token weighing the same.

    -> the cross-entropy in nats per token, and in bits per byte of text, by which models with
    different tokenizers can be compared
    """
    device, T, n = model.wte.weight.device, model.config.block_size, len(tokens) - 1
    num_bytes = np.array([tokenizer.num_bytes(id) for id in range(len(tokenizer))])
    whole = n - n % T  # all but the last, shorter window
    bounds = sorted({*range(0, whole, batch_size * T), whole, n})
    rank, size = process()
    nats, length, training = 0.0, 0, model.training
    model.eval()
    for start, stop in [*itertools.pairwise(bounds)][rank::size]:
        part = tokens[start:stop + 1]
        length += num_bytes[part[1:]].sum()
        part = torch.from_numpy(part.astype(np.int64)).to(device)
        x, y = (t.view(-1, min(T, stop - start)) for t in (part[:-1], part[1:]))  # [B, T]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            nats += model(x, y)[1].item() * y.numel()
    model.train(training)
    nats, length = add_up(torch.tensor([nats, length], dtype=torch.float64)).tolist()
    return nats / n, nats / length / math.log(2)


def draw_sample(model, tokenizer, run, step):
    """200 tokens of the model's own, from the same random numbers every time."""
    device = model.wte.weight.device
    generator = torch.Generator("cpu" if device.type == "mps" else device).manual_seed(0)
    idx = torch.tensor([[tokenizer.start]], device=device)
    tokens = model.generate(idx, 200, top_k=40, generator=generator)
    text = tokenizer.decode(tokens[0, 1:].tolist())
    write_text(run / f"sample_step_{step:06d}.txt", text)
    print(textwrap.indent(text, "    "), flush=True)


def draw_curves(rows, run, heading):
    common.save_curves(run / "loss.png", f"{heading}\ncross-entropy", "nats per token", rows,
                       {"train": "train_loss", "val": "val_loss"}, {}, x="step")


def fit(model, tokenizer, train, val, args, run, dtype, heading, kept, state=None):
    """Fit `model` to the tokens `train`. `kept` is what every checkpoint holds beside the model;
    `state`, the content of a last.pt, is where to go on from.

    Under torchrun each process calls this with the same arguments, and that of rank 0 writes.
    """
    device, block_size = model.wte.weight.device, model.config.block_size
    rank, size = process()
    net = model  # or a wrapper of it, whose backward pass averages the gradients of all processes
    if size > 1:
        net = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    matrices = [p for p in model.parameters() if p.dim() == 2]  # the first two: wte and wpe
    vectors = [p for p in model.parameters() if p.dim() == 1]  # of biases and LayerNorms
    first = 2 if args.optimizer == "muon" else len(matrices)
    optimizers = {"adamw": torch.optim.AdamW(
        [{"params": matrices[:first]}, {"params": vectors, "weight_decay": 0.0}],
        args.lr, betas=(0.9, 0.99), weight_decay=args.weight_decay, fused=True)}
    if args.optimizer == "muon":
        optimizers["muon"] = Muon(matrices[first:], args.lr, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, seconds, best, rows = 0, 0.0, math.inf, []
    sums = torch.zeros(2, device=device)  # of loss and gradient norm, over the steps since a row
    if state:
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizer"][name])
        if state["scaler"]:  # empty after training without float16
            scaler.load_state_dict(state["scaler"])
        step, seconds, best, rows = (state[k] for k in ("step", "seconds", "best", "rows"))
        sums = state["sums"].to(device)
    tokens_per_step = args.batch_size * block_size
    part_size = args.batch_size // (args.grad_accum * size)
    peak = matrix_rate(device, dtype) * size

    def save_last():
        common.save_checkpoint(run / "last.pt", kept | {
            "model": model.state_dict(), "scaler": scaler.state_dict(), "optimizer": {
                name: optimizer.state_dict() for name, optimizer in optimizers.items()},
            "step": step, "seconds": seconds, "best": best, "rows": rows, "sums": sums})

    def save_best(bits):
        common.save_checkpoint(run / "best.pt", kept | {
            "model": model.state_dict(), "step": step, "val": best, "val_bits_per_byte": bits})

    def check_finite(loss):
        if not math.isfinite(loss):
            raise common.UserError(
                f"the loss is not finite at step {step}: start again with a lower --lr "
                f"({run / 'last.pt'} keeps the last good model)")

    if step == 0:
        best, bits = evaluate(model, val, tokenizer, part_size, dtype)
    if rank == 0:
        write_metrics(run, rows)
        if step == 0:
            save_best(bits)
            save_last()
            print(f"step {step:5d}/{args.max_steps} | before       | val {best:.4f} | "
                  f"{bits:.3f} bits/byte", flush=True)
            draw_sample(model, tokenizer, run, step)

    with StopRequest() as stop:
        while not rows or rows[-1]["step"] < args.max_steps:
            began, resumed_at = time.perf_counter(), step
            until = min((len(rows) + 1) * args.eval_every, args.max_steps)
            bar = tqdm(range(step, until), f"step {until}/{args.max_steps}", unit=" tok",
                       unit_scale=tokens_per_step, leave=False, disable=rank > 0 or None)
            for _ in bar:
                lr = learning_rate(step, args)
                for optimizer in optimizers.values():
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                # For dropout; with the last number 0 it would be the seed of the windows below.
                seed_step(device, args.seed, step, 1 + rank)

                windows = random_windows(train, args.batch_size, block_size, args.seed, step)
                mine = windows.chunk(size)[rank].to(device)  # [B / size, T + 1]
                loss = torch.zeros((), device=device)
                for i, part in enumerate(mine.split(part_size), 1):
                    # DDP averages over the processes in backward(): only with the last part.
                    average = size == 1 or i == args.grad_accum
                    with contextlib.nullcontext() if average else net.no_sync():
                        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                            part_loss = net(part[:, :-1], part[:, 1:])[1] / args.grad_accum
                        scaler.scale(part_loss).backward()
                    loss += part_loss.detach()
                for optimizer in optimizers.values():
                    scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
                for optimizer in optimizers.values():
                    if not scaler.is_enabled() or norm.isfinite():  # float16 may have overflowed
                        scaler.step(optimizer)
                    optimizer.zero_grad()
                scaler.update()

                loss = add_up(loss) / size
                sums += torch.stack([loss, norm.nan_to_num(posinf=0)])  # read once, below
                step += 1
                if step % 10 == 0:  # not each time: to read the loss is to wait for the device
                    bar.set_postfix_str(f"loss {loss:.3f} lr {lr:.1e} norm {norm:.2f}")
                    check_finite(loss.item())
                if add_up(torch.tensor(float(stop.asked))):  # so all stop at the same step
                    bar.close()
                    seconds += time.perf_counter() - began
                    if rank == 0:
                        save_last()
                        launcher = "python" if size == 1 else "torchrun ... (as before)"
                        print(f"stopped after step {step}; go on with: "
                              f"{launcher} gpt.py train --resume {run}", flush=True)
                    add_up(torch.zeros(1))  # torchrun ends all once one has: the save comes first
                    sys.exit(130)
            since = rows[-1]["step"] if rows else 0
            train_loss, grad_norm = (sums / (step - since)).tolist()  # waits for the device
            sums.zero_()
            elapsed, done = time.perf_counter() - began, step - resumed_at
            tokens_per_s = tokens_per_step * done / elapsed
            val_loss, bits = evaluate(model, val, tokenizer, part_size, dtype)
            check_finite(train_loss + val_loss)
            seconds += time.perf_counter() - began
            rows.append({
                "epoch": round(step * tokens_per_step / len(train), 3), "step": step,
                "seconds": round(seconds, 2), "tokens_per_s": round(tokens_per_s),
                "train_loss": train_loss, "val_loss": val_loss, "val_bits_per_byte": bits,
                "lr": learning_rate(step - 1, args), "grad_norm": grad_norm})
            improved, best = val_loss < best, min(best, val_loss)
            if rank == 0:
                if improved:
                    save_best(bits)
                save_last()
                write_metrics(run, rows)
                print(f"step {step:5d}/{args.max_steps} | train {train_loss:.4f} | "
                      f"val {val_loss:.4f} | {bits:.3f} bits/byte | "
                      f"lr {rows[-1]['lr']:.1e} norm {grad_norm:.2f} | "
                      f"{1000 * elapsed / max(done, 1):.1f} ms {tokens_per_s / 1000:.1f}k tok/s "
                      f"{flops_per_token(model) * tokens_per_s / peak:.0%} MFU | {seconds:.1f} s",
                      flush=True)
                draw_sample(model, tokenizer, run, step)
                draw_curves(rows, run, heading)
    return rows


# ---------------------------------------------------------------------------------------------
# The command line


def pick_device(args):
    """common.pick_device, and the modes that all of gpt.py computes in"""
    device, dtype = common.pick_device(args.device, not args.no_amp)
    torch.set_flush_denormal(True)  # a CPU takes many times longer for numbers below 1e-38
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32; cuDNN's convolutions have it already
    return device, dtype


def write_samples(args):
    """The `generate` command: texts to standard output, all else to standard error."""
    device, dtype = pick_device(args)
    try:
        prompt = args.prompt
        if prompt == "-":
            prompt = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise common.UserError(f"standard input is no UTF-8: {error}") from error
    try:
        model = GPT.from_pretrained(args.model).to(device, dtype)
        tokenizer = load_tokenizer(args.model)
        ids = tokenizer.encode(prompt)
    except ValueError as error:
        raise common.UserError(error) from error
    V, block_size, end = model.config.vocab_size, model.config.block_size, tokenizer.end_of_text
    if len(tokenizer) > V:
        raise common.UserError(f"{args.model}: the tokenizer knows {len(tokenizer):,} tokens and "
                               f"the model {V:,}: they do not belong together")
    print(f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters on {device} in "
          f"{str(dtype).removeprefix('torch.')}; tokens: {len(ids):,} of the prompt, up to "
          f"{args.max_new_tokens:,} more", file=sys.stderr, flush=True)
    idx = torch.tensor([ids or [tokenizer.start]], device=device).expand(args.num_samples, -1)
    if idx.size(1) + args.max_new_tokens - 1 > block_size:
        print(f"warning: the model sees only the last {block_size:,} tokens, and is slow once "
              "there are more", file=sys.stderr)

    generator = torch.Generator("cpu" if device.type == "mps" else device).manual_seed(args.seed)
    choose = functools.partial(
        next_token, do_sample=not args.greedy, temperature=args.temperature, top_k=args.top_k,
        top_p=args.top_p, generator=generator)
    made, begin = 0, time.perf_counter()

    def until_end(row):
        nonlocal made
        for id in row:
            made += 1
            if id == end:
                return
            yield id

    tokens = model.stream(idx, args.max_new_tokens, choose, end)
    if args.num_samples == 1:
        rows = [(token.item() for token in tokens)]
    else:
        bar = tqdm(tokens, total=args.max_new_tokens, unit=" tokens", disable=None)
        rows = torch.cat([idx[:, :0], *bar], dim=1).tolist()
    for i, row in enumerate(rows):
        print("---\n" if i else "", end="")
        print(tokenizer.decode(ids), end="", flush=True)
        for text in tokenizer.stream(until_end(row)):
            print(text, end="", flush=True)
        print()
    seconds = time.perf_counter() - begin
    print(f"{made:,} tokens in {seconds:.1f} s: {made / seconds:.1f} tokens/s", file=sys.stderr)


# What `train` does where it is not told otherwise: on a CPU, as much as two cores learn in three
# minutes; on a GPU, the recipe that nanoGPT made known; from weights that have learned already,
# small steps.
RECIPES = {
    "cpu": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12,
            "dropout": 0.0, "optimizer": "muon", "max_steps": 2000, "eval_every": 400},
    "cuda": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64,
             "dropout": 0.2, "optimizer": "adamw", "max_steps": 5000, "eval_every": 250},
    "init": {"batch_size": 4, "dropout": 0.0, "optimizer": "adamw", "lr": 5e-5,
             "max_steps": 100, "eval_every": 25},
}
RATES = {"adamw": 0.4, "muon": 0.9}  # the highest learning rate, times n_embd


def find_tokenizer(args, characters):
    """The tokenizer that comes with --init, or else the one that --tokenizer names.

    Raises UserError where they differ, or where there is none.
    """
    tokenizer = None
    if args.init != "scratch":
        with contextlib.suppress(FileNotFoundError):
            tokenizer = load_tokenizer(args.init)
    if tokenizer is not None:
        own = "gpt2" if isinstance(tokenizer, BPETokenizer) else "char"
        if args.tokenizer not in (None, own):
            raise common.UserError(f"--tokenizer {args.tokenizer} does not fit --init {args.init}, "
                                   f"which has one of its own, {own}: leave it out")
        return tokenizer
    if args.init != "scratch" and args.tokenizer is None:
        raise common.UserError(f"--init {args.init} comes without a tokenizer: put GPT-2's "
                               f"{' and '.join(TOKENIZER_FILES)} there, or pass --tokenizer")
    if args.tokenizer != "gpt2":
        return CharTokenizer(characters)
    folder = Path(args.data_dir, "gpt2")
    if not all((folder / file).exists() for file in TOKENIZER_FILES):
        folder = download("gpt2", *TOKENIZER_FILES)
    return BPETokenizer(*(folder / file for file in TOKENIZER_FILES))


def train_model(args, argv):
    """The `train` command; under torchrun each process runs it."""
    state = None
    if args.resume is not None:
        run = Path(args.resume)
        state = common.load_checkpoint(run / "last.pt", "gpt.py")
        args = parse_args(argv, state["args"])  # the run's own, but for what is given now
    device, dtype = pick_device(args)
    if state is None:
        args.defaults = ("init" if args.init != "scratch" else
                         "cuda" if device.type == "cuda" else "cpu")
        by_size = zip(("n_layer", "n_head", "n_embd"), SIZES.get(args.size, ()), strict=False)
        for name, value in (RECIPES[args.defaults] | dict(by_size)).items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        args.lr = args.lr or RATES[args.optimizer] / args.n_embd
        args.warmup = args.max_steps // 20 if args.warmup is None else args.warmup

    size = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % (args.grad_accum * size):
        raise common.UserError(f"--batch-size {args.batch_size} is no multiple of --grad-accum "
                               f"{args.grad_accum} times {size}, the number of processes")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if size > 1:
        if device.type == "cuda":
            if local_rank >= torch.cuda.device_count():
                raise common.UserError(f"there are {torch.cuda.device_count()} GPUs here: choose "
                                       "--nproc-per-node accordingly")
            torch.cuda.set_device(local_rank)
        dist.init_process_group()  # NCCL for tensors on a GPU, gloo for others
    rank, _ = process()

    # A barrier, to which the first process of a machine comes last: when it has downloaded and
    # tokenized what the others then find.
    if local_rank > 0:
        add_up(torch.zeros(1))
    path = args.text or find_text(args.data_dir, stand_in=state is None)
    text = read_text(Path(path), args.limit)
    if state and state["text"] != text.digest:
        raise common.UserError(f"{text.path} is not the text that {run} began with: give that one "
                               "as --text")
    stand_in = text.path.name == STAND_IN
    if stand_in:
        args.text = str(text.path)  # to resume with it even where tiny Shakespeare can be had
    if state is None:
        run = Path(args.out_dir or f"runs/gpt-{text.path.stem}")
    torch.manual_seed(args.seed)
    try:
        if state:
            tokenizer = load_tokenizer(run / "last.pt")
            model = GPT(GPTConfig(**state["config"]))
            model.load_state_dict(state["model"])
        elif args.init == "scratch":
            tokenizer = find_tokenizer(args, text.characters)
            model = GPT(GPTConfig(len(tokenizer), args.block_size, args.n_layer, args.n_head,
                                  args.n_embd, args.dropout))
        else:
            model = GPT.from_pretrained(args.init, args.dropout).train()
            args.block_size = args.block_size or min(model.config.block_size, 256)
            model.crop(args.block_size)
            tokenizer = find_tokenizer(args, text.characters)
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer):,} tokens and {args.init} "
                             f"{model.config.vocab_size:,}: they do not belong together")
        train, val = tokenize(text, tokenizer, run.absolute().parent, args.block_size)
    except ValueError as error:
        raise common.UserError(error) from error
    if local_rank == 0:
        add_up(torch.zeros(1))
    number = int(text.digest[:12], 16)
    if add_up(torch.tensor(number)) != size * number:
        raise common.UserError(f"{text.path} is not the same text on every machine")

    model.to(device)
    kind = "characters" if isinstance(tokenizer, CharTokenizer) else "GPT-2's tokens"
    heading = f"GPT on {text.path.name}, {kind}"
    if rank == 0:
        if state is None:
            run = common.new_run_folder(run, args)
            for file in getattr(tokenizer, "files", ()):
                shutil.copy(file, run)
        config, count = model.config, sum(p.numel() for p in model.parameters())
        floats = 4 * count  # weights, gradients and AdamW's two running means
        if args.optimizer == "muon":
            floats -= sum(p.numel() for p in model.h.parameters() if p.dim() == 2)  # it has one
        flops = flops_per_token(model) * args.batch_size * config.block_size
        print(f"{heading}: {count:,} parameters ({config.n_layer} layers, {config.n_head} heads, "
              f"{config.n_embd} wide; defaults: {args.defaults}) on "
              f"{f'{size} x ' if size > 1 else ''}{device} in "
              f"{str(dtype).removeprefix('torch.')}; {4 * floats / 1e6:,.1f} MB of weights, "
              f"gradients and optimizer on each; {len(train):,} train, {len(val):,} val tokens, "
              f"{len(tokenizer):,} different; {args.max_steps:,} steps of {args.batch_size} x "
              f"{config.block_size} tokens, {flops / 1e9:,.1f} GFLOP each; -> {run}", flush=True)
    kept = {"config": dataclasses.asdict(model.config), "args": vars(args), "text": text.digest,
            "characters": getattr(tokenizer, "characters", None)}
    rows = fit(model, tokenizer, train, val, args, run, dtype, heading, kept, state)
    if rank == 0:
        best = common.load_checkpoint(run / "best.pt", "gpt.py")
        results = {"val_loss": best["val"], "val_bits_per_byte": best["val_bits_per_byte"],
                   "step": best["step"], "seconds": rows[-1]["seconds"], "device": str(device),
                   "torch": torch.__version__}
        write_text(run / "test.json", json.dumps(results, indent=2) + "\n")
        print(f"best: step {best['step']}, val {best['val']:.4f}; to read more of it: "
              f"python gpt.py generate --model {run}")
        if stand_in:
            print("warning: no tiny Shakespeare, so all this is of Python's documentation",
                  file=sys.stderr)
        print(run)
    if dist.is_initialized():
        dist.destroy_process_group()


def parse_args(argv=None, run_args=None):
    parser = argparse.ArgumentParser(prog="gpt.py", description="Train a GPT, and write with it.",
                                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    default = "(default: %(default)s)"

    # prog and usage: else errors would start with "gpt.py generate: error:".
    command = commands.add_parser("generate", help="continue a prompt", allow_abbrev=False,
                                  prog="gpt.py", usage="gpt.py generate [options]")
    group = command.add_argument_group("model and prompt")
    group.add_argument("--model", default="gpt2", metavar="NAME|DIR|FILE",
                       help=f"{', '.join(PRETRAINED)}; a folder with a GPT-2's weights and "
                       f"tokenizer, or the weights in it; or the folder of a run {default}")
    group.add_argument("--prompt", default="", metavar="TEXT", help="how the text begins, best "
                       "without a space at its end; - reads it from standard input (default: "
                       "nothing, so that a new text is begun)")
    group = command.add_argument_group("sampling")
    group.add_argument("--num-samples", type=integer(1), default=1,
                       help=f"how many texts, made as one batch {default}")
    group.add_argument("--max-new-tokens", type=integer(0), default=200,
                       help=f"how many tokens at most each goes on for {default}")
    group.add_argument("--greedy", action="store_true",
                       help="always the most probable token, instead of the three below")
    group.add_argument("--temperature", type=number(0), default=1.0, help="below 1 favours "
                       f"the more probable tokens, above 1 the others, 0 is greedy {default}")
    group.add_argument("--top-k", type=integer(0), default=40,
                       help=f"draw from the k most probable tokens, 0: from all {default}")
    group.add_argument("--top-p", type=number(0, 1), default=1.0, help="draw from the most "
                       f"probable tokens that make up this share of the probability {default}")
    group.add_argument("--seed", type=integer(0), default=42,
                       help=f"another seed, another text {default}")
    group = command.add_argument_group("device")
    group.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
                       help=f"auto takes cuda, else mps, else cpu {default}")
    group.add_argument("--no-amp", action="store_true", help="weights in float32 on CUDA, instead "
                       "of bfloat16 or float16")

    trainer = commands.add_parser("train", help="learn a text", allow_abbrev=False, prog="gpt.py",
                                  usage="gpt.py train [options]")

    def by_recipe(name):
        return "default: " + ", ".join(
            f"{recipe[name]} for {key}" for key, recipe in RECIPES.items() if name in recipe)

    group = trainer.add_argument_group("text and model", "In the defaults init stands for a model "
                                       "from --init, and cpu for mps, too.")
    group.add_argument("--text", metavar="FILE", help="any UTF-8 text, of which the last 10%% "
                       "validate (default: tiny Shakespeare, downloaded once)")
    group.add_argument("--tokenizer", choices=["char", "gpt2"], help="a token for each character, "
                       "or GPT-2's (default: char, or what --init comes with)")
    group.add_argument("--init", default="scratch", metavar="scratch|NAME|DIR|FILE", help="weights "
                       f"to go on from, as for generate --model, or none {default}")
    group.add_argument("--size", choices=SIZES, help="the next three by name")
    group.add_argument("--n-layer", type=integer(1), help=by_recipe("n_layer"))
    group.add_argument("--n-head", type=integer(1), help=by_recipe("n_head"))
    group.add_argument("--n-embd", type=integer(1), help=by_recipe("n_embd"))
    group.add_argument("--block-size", type=integer(1), metavar="T", help="tokens that the "
                       f"model sees at once ({by_recipe('block_size')}, at most 256 for init)")
    group.add_argument("--dropout", type=number(0, 1), help=by_recipe("dropout"))
    group = trainer.add_argument_group("training")
    group.add_argument("--max-steps", type=integer(1), help=by_recipe("max_steps"))
    group.add_argument("--eval-every", type=integer(1), metavar="STEPS", help="how often to "
                       f"validate, save and write a sample ({by_recipe('eval_every')})")
    group.add_argument("--batch-size", type=integer(1), help="sequences a step, of all "
                       f"processes together ({by_recipe('batch_size')})")
    group.add_argument("--grad-accum", type=integer(1), default=1, help="in how many parts "
                       f"each process takes its share of them, to save memory {default}")
    group.add_argument("--optimizer", choices=["muon", "adamw"], help="muon for the matrices of "
                       f"the layers and adamw for the rest, or adamw ({by_recipe('optimizer')})")
    group.add_argument("--lr", type=positive, help="highest learning rate (default: "
                       f"{RATES['muon']} / n_embd with muon, {RATES['adamw']} / n_embd with "
                       f"adamw, {RECIPES['init']['lr']} for init)")
    group.add_argument("--min-lr", type=number(0), default=0.0,
                       help=f"learning rate at the end {default}")
    group.add_argument("--warmup", type=integer(0), metavar="STEPS", help="in which the "
                       "learning rate rises (default: a twentieth of all)")
    group.add_argument("--weight-decay", type=number(0), default=0.1,
                       help=f"of matrices and embeddings {default}")
    group.add_argument("--grad-clip", type=number(0), default=1.0,
                       help=f"longest gradient, others are shortened to it; 0: any {default}")
    group.add_argument("--seed", type=integer(0), default=42,
                       help=f"of the weights, the batches and the dropout {default}")
    group = trainer.add_argument_group("data, device and run")
    group.add_argument("--data-dir", default="data", metavar="DIR", help="where tiny Shakespeare "
                       f"is, or is downloaded to, and gpt2/ with GPT-2's tokenizer {default}")
    group.add_argument("--limit", type=integer(1), metavar="N",
                       help="a quick try: only the first N characters of the text (default: all)")
    group.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
                       help=f"auto takes cuda, else mps, else cpu {default}")
    group.add_argument("--no-amp", action="store_true", help="no autocast to bfloat16 or "
                       "float16 on CUDA (elsewhere there is none anyway)")
    group.add_argument("--out-dir", metavar="DIR", help="where the run is kept; a folder that "
                       "holds something gets a suffix (default: runs/gpt-NAME for NAME.txt)")
    group.add_argument("--resume", metavar="DIR", help="go on with the run in DIR, under its own "
                       "arguments; only --device, --data-dir and --text may be given beside it")
    trainer.set_defaults(command="train", script="gpt.py")

    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        args = parse_run_args(trainer, argv[1:], run_args)
        own = [f"--{name.replace('_', '-')}" for name in ("size", "n_layer", "n_head", "n_embd")
               if getattr(args, name) is not None]
        if args.init != "scratch" and own and not run_args:
            trainer.error(f"--init keeps the size of its model: leave out {' '.join(own)}")
        return args
    args = parser.parse_args(argv)
    choices = ("temperature", "top_k", "top_p")
    if args.greedy and any(getattr(args, name) != command.get_default(name) for name in choices):
        command.error("--greedy leaves nothing to --temperature, --top-k and --top-p: leave them "
                      "out")
    return args


@common.command("gpt.py")
def main(argv=None):
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Not everywhere the default, as on Windows; what cannot be encoded becomes "?".
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    args = parse_args(argv)
    try:
        train_model(args, argv) if args.command == "train" else write_samples(args)
    except BrokenPipeError:
        raise
    except OSError as error:  # a file that is not there, a download that failed
        raise common.UserError(error) from error


if __name__ == "__main__":
    main()
