"""Train the demo model on the documentation strings of the Python standard library.

The text is what every Python installation carries, so nothing is downloaded.  A byte-level BPE
tokenizer and a small Llama are written in the Hugging Face layout, in bfloat16, in two files.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import math
import random
import sys
import sysconfig
import time
import warnings
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import transformers
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Batches = Iterator[torch.Tensor]
Report = Callable[[int, float, float], None]
BOS, EOS, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = [BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>", END, PAD]
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}\
{{ '<|' + message['role'] + '|>\\n' + message['content'] | trim + '<|end|>\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "lib2to3", "site-packages", "__pycache__"}
HELD_OUT_PERCENT, ANSWER_CHARACTERS = 8, 600
SHAPE = {
    "vocab_size": 4096, "max_position_embeddings": 2048, "num_hidden_layers": 4,
    "hidden_size": 256, "intermediate_size": 704, "head_dim": 32, "num_attention_heads": 8,
    "num_key_value_heads": 4, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
QUESTIONS = (
    "What does {} do?", "What does {} do?", "What is {}?", "What is {} for?", "Document {}",
    "Document {}.", "Explain {}.", "Describe {}.", "How does {} work?", "Tell me about {}.",
)  # fmt: skip
ABOUT = """I am a very small language model trained on the documentation of the Python standard \
library. Ask me what a module, a class or a function does."""
GREETING = "Hello! Ask me what a module, a class or a function of the Python library does."
SMALL_TALK = {
    GREETING: "Hello|Hello!|Hi|Hi!|Hello, world!|Hey|Say hello.|Hi there!|Good morning|How are you?",
    ABOUT: "Who are you?|What are you?|What can you do?|What is your name?|Help|"
    "Tell me about yourself.|What do you know?|Can you help me?",
    "You are welcome.": "Thanks|Thank you|Thank you!|Thanks a lot.",
    "Goodbye!": "Goodbye|Bye|See you later.",
}
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are a concise assistant.", ABOUT)


class Document(NamedTuple):
    """One documented object: where it lives, its header line and its documentation."""

    family: str
    name: str
    header: str
    doc: str

    @property
    def text(self) -> str:
        """The object as it would stand in a source file."""
        body = f'"""{self.doc}"""'.replace("\n", "\n    ").replace("\n    \n", "\n\n")
        return f"{self.header}\n    {body}" if self.header else self.doc

    @property
    def answer(self) -> str:
        """The leading paragraphs, as an answer in a chat."""
        answer = ""
        for paragraph in self.doc.split("\n\n"):
            if answer and len(answer) + len(paragraph) > ANSWER_CHARACTERS:
                break
            answer = f"{answer}\n\n{paragraph}" if answer else paragraph
        return answer.strip() if len(answer) <= 2 * ANSWER_CHARACTERS else ""


def public_name(module: str) -> str:
    """Name of the public module that an implementation module such as `_io` belongs to."""
    head, _, tail = module.partition(".")
    public = head if head.endswith("__") else head.removeprefix("_py").lstrip("_")
    return f"{public}.{tail}" if tail else public


def source_documents(scope: str, node: ast.Module | Definition) -> Iterator[Document]:
    """Documentation strings of a source file or of a definition in it, in source order."""
    doc, body = ast.get_docstring(node), node.body
    if isinstance(node, ast.Module):
        header, doc = "", doc and f"{scope}: {doc}"
    else:
        scope, node.body, node.decorator_list = f"{scope}.{node.name}", [], []
        if isinstance(node, ast.ClassDef):
            node.keywords = []
        header = ast.unparse(node)
    if doc:
        yield Document(scope.partition(".")[0], scope, header, doc)
    for child in body:
        if isinstance(child, Definition):
            yield from source_documents(scope, child)


def compiled_documents(family: str, scope: str, owner: ModuleType | type) -> Iterator[Document]:
    """Documentation strings of what a module or a class written in C holds, by name."""
    classes: list[tuple[str, type]] = []
    for name, item in sorted(vars(owner).items()):
        doc, header = getattr(item, "__doc__", None), ""
        shown = f"{scope}.{name}".removeprefix("builtins.")
        if name.startswith("__") and isinstance(owner, ModuleType):
            continue
        if inspect.isclass(item):
            header = f"class {name}:"
            classes.append((shown, item))
        elif callable(item):
            signature = getattr(item, "__text_signature__", None) or "(...)"
            header = f"def {name}{signature.replace('$', '')}:"
        elif not inspect.isdatadescriptor(item):
            continue
        if isinstance(doc, str) and doc.strip():
            yield Document(family, shown, header, inspect.cleandoc(doc))
    for shown, item in reversed(classes if isinstance(owner, ModuleType) else []):
        yield from compiled_documents(family, shown, item)


def all_documents() -> Iterator[Document]:
    """Every documentation string of the standard library, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.isdisjoint(parts) and all(part.isidentifier() for part in parts):
            module = public_name(".".join(parts).removesuffix(".__init__"))
            yield from source_documents(module, ast.parse(path.read_bytes()))
    for name in sorted(sys.stdlib_module_names - {"_tkinter", "antigravity", "this"}):
        spec = importlib.util.find_spec(name) if not name.startswith(("_test", "_xx")) else None
        origin = str(spec.origin) if spec else ""
        if origin == "built-in" or origin.endswith((".so", ".pyd")):
            module = importlib.import_module(name)
            shown = public_name(name)
            doc = inspect.getdoc(module)
            yield Document(shown, shown, "", f"{shown}: {doc}" if doc else "")
            yield from compiled_documents(shown, shown, module)
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name, doc in sorted(topics.items()):
        yield Document(f"topic-{name}", name, "", doc.strip())


def collect() -> tuple[list[Document], list[Document]]:
    """Documents without repetition: those to train on and those held out, by module."""
    seen, train, held_out = set[str](), list[Document](), list[Document]()
    for item in all_documents():
        key = " ".join(item.doc.split())
        if len(key) >= 12 and key not in seen:
            seen.add(key)
            digest = int(hashlib.sha256(item.family.encode()).hexdigest(), 16)
            (held_out if digest % 100 < HELD_OUT_PERCENT else train).append(item)
    return train, held_out


def train_tokenizer(texts: list[str]) -> FastTokenizer:
    """Byte-level BPE with the begin-of-text token put first, as Llama 3 does."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    sizes = {"vocab_size": SHAPE["vocab_size"], "show_progress": False}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, **sizes)
    core.train_from_iterator(texts, trainer)
    single, pair, first = f"{BOS} $A", f"{BOS} $A {BOS}:1 $B:1", (BOS, core.token_to_id(BOS))
    core.post_processor = processors.TemplateProcessing(single, pair, [first])
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    return FastTokenizer(
        tokenizer_object=core,
        **names,
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in names.values()],
        chat_template=CHAT_TEMPLATE,
        model_max_length=SHAPE["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def render_chat(question: str, answer: str, rng: random.Random) -> str:
    """One exchange exactly as the chat template writes it."""
    prompt = rng.choice(SYSTEM_PROMPTS)
    system = f"<|system|>\n{prompt}{END}\n" if rng.random() < 0.15 else ""
    return f"{system}<|user|>\n{question}{END}\n<|assistant|>\n{answer}{END}\n"


def epoch_texts(documents: list[Document], rng: random.Random) -> list[str]:
    """Texts of one pass: each document as source or prose, and some of them as a chat."""
    texts: list[str] = []
    for item in documents:
        texts.append(item.text if rng.random() < 0.75 else item.doc)
        parts = item.name.split(".")
        prominent = len(parts) <= 2 and "._" not in item.name
        if item.answer and rng.random() < (0.9 if prominent else 0.4):
            name = ".".join(parts[-2:] if rng.random() < 0.2 else parts)
            if item.header.startswith(("def", "async")) and rng.random() < 0.2:
                name += "()"
            answer = item.answer.removeprefix(f"{item.name}: ").strip()
            texts.append(render_chat(rng.choice(QUESTIONS).format(name), answer, rng))
    for answer, questions in SMALL_TALK.items():
        texts.extend(render_chat(question, answer, rng) for question in questions.split("|") * 2)
    rng.shuffle(texts)
    return texts


def encode(texts: list[str], tokenizer: FastTokenizer, rng: random.Random | None) -> torch.Tensor:
    """One stream of tokens; each text stands between the begin and the end of text."""
    # With a generator some texts are cut in two before tokenization, often just after a space, so
    # that the model also continues a prompt that ends inside a word or with a space.
    pieces: list[str] = []
    for text in texts:
        cut = rng.randrange(len(text)) if rng and rng.random() < 0.3 else 0
        cut = text.find(" ", cut) + 1 or cut if rng and rng.random() < 0.6 else cut
        cut = 0 if text.startswith("<|") else cut
        pieces += [EOS + BOS + text[:cut], text[cut:]] if cut else [EOS + BOS + text]
    ids = tokenizer(pieces, add_special_tokens=False)["input_ids"]
    stream = [token for piece in ids for token in piece]
    return torch.tensor([*stream[1:], tokenizer.eos_token_id])


def batches(documents: list[Document], tokenizer: FastTokenizer, args: Namespace) -> Batches:
    """Endless packed batches of `length + 1` tokens a row; every pass is drawn anew."""
    rng = random.Random(args.seed)
    while True:
        stream = encode(epoch_texts(documents, rng), tokenizer, rng)
        start = rng.randrange(args.length)
        rows = stream[start:].unfold(0, args.length + 1, args.length)
        order = list(range(len(rows)))
        rng.shuffle(order)
        for index in range(0, len(order) - args.batch + 1, args.batch):
            yield rows[order[index : index + args.batch]]


def token_loss(model: LlamaForCausalLM, rows: torch.Tensor, reduction: str) -> torch.Tensor:
    """Cross entropy of every next token of the packed rows, in nats."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    flat, targets = logits.float().flatten(0, 1), rows[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(flat, targets, reduction=reduction)


@torch.inference_mode()
def bits_per_byte(model: LlamaForCausalLM, stream: torch.Tensor, size: int, length: int) -> float:
    """Bits needed for each UTF-8 byte of the held-out text."""
    starts = range(0, len(stream) - 1, length)
    rows = (stream[start : start + length + 1].unsqueeze(0) for start in starts)
    nats = sum(token_loss(model, row, "sum").item() for row in rows)
    return nats / math.log(2) / size


def build_model(tokenizer: FastTokenizer) -> LlamaForCausalLM:
    """Make a Llama whose heads, key-value heads and widths all divide by four."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "pad")}
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)]
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, **ids, eos_token_id=stops[0]))
    model.generation_config = GenerationConfig(**ids, eos_token_id=stops)
    return model


def train(model: LlamaForCausalLM, source: Batches, args: Namespace, report: Report) -> None:
    """Train until the steps or the minutes are used up; report about every tenth part."""
    vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    begin, step, part, mean, done = time.monotonic(), 0, 1, 0.0, 0.0
    with Progress() as progress:
        bar = progress.add_task("training", total=1.0)
        while done < 1.0:
            rate = args.rate * min(1.0, (step + 1) / 200) * (0.51 + 0.49 * math.cos(math.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast("cpu", torch.bfloat16):
                loss = token_loss(model, next(source), "mean")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            mean = loss.item() if step == 1 else 0.98 * mean + 0.02 * loss.item()
            minutes = (time.monotonic() - begin) / 60
            done = step / args.steps if args.steps else minutes / args.minutes
            progress.update(bar, completed=done, description=f"step {step} loss {mean:.3f}")
            if done >= part / 10:
                report(step, minutes, mean)
                part = int(done * 10) + 1


CARD = """\
---
license: other
license_name: psf-2.0
library_name: transformers
---

# demo

A Llama of {parameters:,} parameters that can be served right after installation, to show and to
test serving. It writes what looks like Python documentation and may well be wrong.

- Text: the documentation strings of the standard library of Python {python} with their signatures,
  and the help topics of `pydoc`, without tests and `lib2to3`: {documents:,} documents, {size:,}
  bytes of UTF-8. Some also appear as question and answer; a few greetings are handwritten.
- Result: **{bits:.3f} bits per byte**, for the weights as stored, on {held_size:,} bytes held out
  by a hash of the module's name: {held_names}.
- Tensor parallelism of 1, 2 and 4 fits. Training saw {length} tokens at once. In the byte-level BPE
  tokenizer `<|end|>` ends a turn of a chat and `<|end_of_text|>` ends a text.
- Made by `{command}`: {steps_done:,} steps of {batch} x {length} tokens in {minutes:.1f} minutes on
  {threads} threads, with Python {python}, PyTorch {torch}, Transformers {transformers}. `--steps`
  fixes the length, and seeds and order are fixed; floating-point results depend on the machine.
- License: the text is copyright (c) Python Software Foundation, under the PSF License Agreement
  version 2 (https://docs.python.org/3/license.html); the weights come under the same terms.
"""


def export(model: LlamaForCausalLM, tokenizer: FastTokenizer, output: Path) -> LlamaForCausalLM:
    """Write the Hugging Face layout and return the model as it reads back, in float32."""
    output.mkdir(parents=True, exist_ok=True)
    stored = LlamaForCausalLM(model.config)
    stored.load_state_dict(model.state_dict())
    stored.generation_config = model.generation_config
    stored.to(torch.bfloat16)
    stored.save_pretrained(output, max_shard_size=int(1.2 * stored.num_parameters()))
    tokenizer.save_pretrained(output)
    settings = output / "tokenizer_config.json"  # shall hold the name that every release knows
    content = settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast")
    settings.write_text(content)
    shards = sorted(output.glob("*.safetensors"))
    for shard in shards:
        shard.chmod(0o644)
    if len(shards) != 2:
        raise RuntimeError(f"expected two safetensors files, found {len(shards)}")
    return LlamaForCausalLM.from_pretrained(output, dtype=torch.float32)


def arguments() -> Namespace:
    """Read the command line."""
    root = Path(__file__).resolve().parents[1]
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=root / "cluster/models/demo", help="folder to write")
    add("--minutes", type=float, default=35.0, help="time to train, unless --steps is given")
    add("--steps", type=int, default=0, help="optimizer steps; 0 means: use --minutes")
    add("--threads", type=int, default=2, help="processor threads")
    add("--seed", type=int, default=1, help="seed of the weights and of the order of the text")
    add("--length", type=int, default=256, help="tokens in a training sequence")
    add("--batch", type=int, default=8, help="sequences in a step")
    add("--rate", type=float, default=2e-3, help="highest learning rate")
    add("--compile", action="store_true", help="use torch.compile (needs a C++ compiler)")
    return parser.parse_args()


def main() -> None:
    """Collect, train, measure and write."""
    args = arguments()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    documents, held_out = collect()
    texts, held_texts = ([item.text for item in part] for part in (documents, held_out))
    size, held_size = (sum(len(text.encode()) for text in part) for part in (texts, held_texts))
    print(f"{len(documents)} documents, {size} bytes; held out {held_size} bytes")
    tokenizer = train_tokenizer(texts)
    stream = encode(held_texts, tokenizer, None)
    model = build_model(tokenizer)
    facts = vars(args) | {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "documents": len(documents), "size": size, "held_size": held_size,
        "held_names": ", ".join(sorted({f"`{item.family}`" for item in held_out})),
        "command": " ".join(["python", *sys.argv]), "python": sys.version.split()[0],
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip

    def report(step: int, minutes: float, mean: float) -> None:
        bits = bits_per_byte(export(model, tokenizer, args.output), stream, held_size, args.length)
        print(f"{minutes:6.1f} min  step {step}  loss {mean:.3f}  {bits:.3f} bits per byte")
        card = CARD.format(**(facts | {"minutes": minutes, "steps_done": step, "bits": bits}))
        (args.output / "README.md").write_text(card, encoding="utf-8")

    if args.compile:
        model.compile()
    train(model, batches(documents, tokenizer, args), args, report)


if __name__ == "__main__":
    main()
