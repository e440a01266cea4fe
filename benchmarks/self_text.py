"""Let a model go on from beginnings of a text's documents: more of its own words to train on.

    python benchmarks/self_text.py MODEL TEXT OUT [--tokens N] [--length N] [--beginning N]
        [--together N] [--device NAME] [--seed N]

MODEL is a causal language model with its tokenizer. Beginnings are tokens that follow each other
anywhere in those documents of TEXT that `ternarize train` trains on (none of those that choose or
give figures); each is gone on from at temperature 1, in bfloat16 on a GPU, up to LENGTH tokens. OUT
gets the documents, apart by lines `<|doc|>`, for `ternarize train --texts TEXT=2 --texts OUT`.
"""

import time
from pathlib import Path
from typing import Any

import torch
from common import hide_bars, parser
from torch import Tensor

from ternarize.calibrate.apart import divide_text
from ternarize.measure.documents import SEPARATOR
from ternarize.measure.measured import fast_dtype
from ternarize.models.reads import beginning, open_tokenizer
from ternarize.runtime.decode import cache_of
from ternarize.train.students import open_model


def beginnings(text: Path, tokenizer: Any, count: int, length: int, seed: int) -> Tensor:
    """(count, length) int64: what the tokenizer begins with, then tokens of the text."""
    divided = divide_text(str(text), None, 0, tokenizer)
    documents = [document.text for document in divided.part("train")]
    ids = [i for row in tokenizer(documents, add_special_tokens=False)["input_ids"] for i in row]
    first = beginning(tokenizer)
    several = length - len(first)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - several, (count, 1), generator=generator)
    found = torch.tensor(ids)[starts + torch.arange(several)]
    return torch.cat([torch.tensor(first).expand(count, -1), found], 1)


@torch.inference_mode()
def go_on(model: Any, ids: Tensor, length: int, never: list[int]) -> Tensor:
    """(n, k) -> (n, length): drawn at temperature 1; the words of `never` are not written."""
    step, memory = ids, dict[str, Any]()
    while ids.shape[1] < length:
        output = model(input_ids=step, use_cache=True, logits_to_keep=1, **memory)
        memory, logits = cache_of(output), output.logits[:, -1].float()
        logits[:, never] = -torch.inf
        # the largest of p / e with e drawn from an exponential is a draw from p
        step = (logits.softmax(-1) / torch.empty_like(logits).exponential_()).argmax(-1, True)
        ids = torch.cat([ids, step], 1)
    return ids


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("model", type=Path)
    arguments.add_argument("text", type=Path)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--tokens", type=int, default=1 << 20)
    arguments.add_argument("--length", type=int, default=512)
    arguments.add_argument("--beginning", type=int, default=32)
    arguments.add_argument("--together", type=int, default=1024)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    hide_bars()
    tokenizer = open_tokenizer(given.model)
    model = open_model(given.model, given.device).to(fast_dtype(given.device))
    count = -(-given.tokens // given.length)
    prompts = beginnings(given.text, tokenizer, count, given.beginning, given.seed)
    torch.manual_seed(given.seed)
    begun, written = time.monotonic(), 0
    with given.out.open("w", encoding="utf-8") as out:
        for some in torch.split(prompts, given.together):
            ids = go_on(model, some.to(given.device), given.length, tokenizer.all_special_ids)
            for text in tokenizer.batch_decode(ids, skip_special_tokens=True):
                out.write(f"{text}\n{SEPARATOR}\n")
            written += ids.numel()
    seconds = time.monotonic() - begun
    print(f"{written:,} tokens in {seconds:.0f} s, {written / seconds:,.0f} a second")


if __name__ == "__main__":
    main()
