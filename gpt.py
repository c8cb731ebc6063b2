"""GPT-2, a Transformer that writes text (Radford et al., 2019, "Language Models are Unsupervised
Multitask Learners"; the Transformer is Vaswani et al., 2017, arXiv:1706.03762).

    A text is a sequence of tokens x_1, ..., x_T: words, parts of words, or characters. The model
    gives the probability of each, given those before it:

    p(x_1, ..., x_T) = prod_t p(x_t | x_1, ..., x_{t-1})

    It is trained by minimising the mean of -log p(x_t | x_1, ..., x_{t-1}), the cross-entropy in
    nats per token, and writes by drawing x_t from that distribution again and again.

    python gpt.py generate --prompt "Yesterday I went to the" --num-samples 10
                                         what OpenAI's GPT-2 makes of it, ten times
    python gpt.py generate --model gpt2-xl --greedy --prompt "The capital of France is"
                                         a larger model, and always its most probable token
    python gpt.py generate --model DIR --prompt - < prompt.txt
                                         weights from a folder, a prompt from a file

OpenAI's weights are downloaded once, into torch's own cache.

The assignment is the University of Amsterdam's Deep Learning Practical 3 (2023); "Equation" and
"Q" (question) refer to it. In the comments on shapes B is the batch size, T the number of tokens
in a sequence, S that of the tokens which they may look at, C the size of a token's embedding, H the
number of attention heads and V that of tokens in the vocabulary.
"""

import argparse
import codecs
import functools
import heapq
import io
import itertools
import json
import math
import mmap
import re
import socket
import sys
import time
import unicodedata
import urllib.request
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common

# ---------------------------------------------------------------------------------------------
# The network


@dataclass
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
    def from_pretrained(cls, name_or_path):
        """A trained model, in evaluation mode, float32 and on the CPU.

        name_or_path: one of PRETRAINED, which is downloaded once; or a folder that holds
        config.json with model.safetensors or pytorch_model.bin, or one such file beside its
        config.json; or the folder of a run of this script.

        Raises ConnectionError where a download fails, FileNotFoundError for files that are not
        there, and ValueError for files that are damaged or hold another model than this one.
        """
        path = find_weights(name_or_path)
        config, weights = read_weights(path)
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
        return download(name_or_path)
    path = Path(name_or_path)
    names = ("model.safetensors", "pytorch_model.bin", "best.pt", "last.pt")
    if path.is_dir():
        path = next((path / name for name in names if (path / name).exists()), path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is neither {', '.join(PRETRAINED)} nor a file of weights "
                                f"nor a folder with one: {', '.join(names)}")
    return path


def download(name):
    """-> the path of the weights, in torch's cache, with the other files of that model beside it

    Raises ConnectionError where that fails, after 15 seconds without an answer.
    """
    folder = Path(torch.hub.get_dir(), "checkpoints", name)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(15)
    try:
        for file in ("config.json", "vocab.json", "merges.txt", "model.safetensors"):
            if not (folder / file).exists():
                folder.mkdir(parents=True, exist_ok=True)
                url = f"{HUB}/{name}/resolve/main/{file}"
                print(f"{url} -> {folder}", file=sys.stderr)
                part = folder / f"{file}.part"
                torch.hub.download_url_to_file(url, part, progress=sys.stderr.isatty())
                with urllib.request.urlopen(url) as response:  # torch compares no length
                    if response.length not in (None, part.stat().st_size):
                        raise ConnectionError(f"{file} broke off")
                part.replace(folder / file)
    except (OSError, HTTPException, ValueError) as error:
        raise ConnectionError(f"{name} is not in {folder} and could not be downloaded ({error}): "
                              "run once online, or give a folder with its files") from error
    finally:
        socket.setdefaulttimeout(timeout)
    return folder / "model.safetensors"


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
    files = [path.with_name(name) for name in ("vocab.json", "merges.txt")]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file} is not there: put GPT-2's beside the weights")
    return BPETokenizer(*files)


# ---------------------------------------------------------------------------------------------
# The command line


def write_samples(args):
    """The `generate` command: texts to standard output, all else to standard error."""
    device, dtype = common.pick_device(args.device, not args.no_amp)
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


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="gpt.py", description="Write text with GPT-2.",
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
    group.add_argument("--num-samples", type=common.integer(1), default=1,
                       help=f"how many texts, made as one batch {default}")
    group.add_argument("--max-new-tokens", type=common.integer(0), default=200,
                       help=f"how many tokens at most each goes on for {default}")
    group.add_argument("--greedy", action="store_true",
                       help="always the most probable token, instead of the three below")
    group.add_argument("--temperature", type=common.number(0), default=1.0, help="below 1 favours "
                       f"the more probable tokens, above 1 the others, 0 is greedy {default}")
    group.add_argument("--top-k", type=common.integer(0), default=40,
                       help=f"draw from the k most probable tokens, 0: from all {default}")
    group.add_argument("--top-p", type=common.number(0, 1), default=1.0, help="draw from the most "
                       f"probable tokens that make up this share of the probability {default}")
    group.add_argument("--seed", type=common.integer(0), default=42,
                       help=f"another seed, another text {default}")
    group = command.add_argument_group("device")
    group.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
                       help=f"auto takes cuda, else mps, else cpu {default}")
    group.add_argument("--no-amp", action="store_true", help="weights in float32 on CUDA, instead "
                       "of bfloat16 or float16")
    args = parser.parse_args(argv)
    choices = ("temperature", "top_k", "top_p")
    if args.greedy and any(getattr(args, name) != command.get_default(name) for name in choices):
        command.error("--greedy leaves nothing to --temperature, --top-k and --top-p: leave them "
                      "out")
    return args


@common.command("gpt.py")
def main(argv=None):
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # not everywhere the default, as on Windows
    write_samples(parse_args(argv))


if __name__ == "__main__":
    main()
