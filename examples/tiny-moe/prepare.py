"""Public-domain English prose from Debian packages -> a tokenizer and token files for train.py.

    apt-get download r-cran-janeaustenr r-cran-tokenizers golang-github-pierrec-lz4-dev sword-text-web
    for d in *.deb; do dpkg-deb -x "$d" debs; done
    python prepare.py --debs debs --out work

The texts, all out of copyright, and where the packages keep them:

    austen    the six novels of Jane Austen                 r-cran-janeaustenr
    melville  Moby Dick                                     r-cran-tokenizers
    doyle     The Adventures of Sherlock Holmes             golang-github-pierrec-lz4-dev (test data)
    twain     The Adventures of Tom Sawyer                  golang-github-pierrec-lz4-dev (test data)
    web       a modern English Bible, in the public domain  sword-text-web

Every chapter is one document; one chapter in twenty is held out. Written to --out: tokenizer.json,
tokens.npz (`train_NAME` and `val_NAME`, uint16 ids, documents ended by <|endoftext|>) and NAME.txt
(the cleaned text, to look at). `train_chat` holds short exchanges between the novels' people in the
form of the chat template. Runs in a minute on one core; needs `tokenizers` and `numpy`.
"""

import argparse
import functools
import hashlib
import re
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import rdata

END, TURN, TURN_END = SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HELD_OUT = 20  # every twentieth chapter of each source is held out
MIN_CHAPTER = 1000  # characters; shorter ones are tables of contents and title pages


# ---- from a package's file to a list of chapters, each a list of paragraphs ------------------------

HEADING = re.compile(
    r"((VOLUME|CHAPTER|ADVENTURE|BOOK|EPILOGUE|PREFACE|Chapter|Volume|Epilogue)\b.{0,120}|[IVX]+\. [A-Z' -]{6,})$"
)
NUMBER = re.compile(r"[IVXLC]+\.?$|\d+\.?$")
# Paragraphs with this racial slur, also within a longer word, are left out: the SHA-256 of its six letters.
SLUR = "120f6e5b4ea32f65bda68452fcfaaef06b0136e1d0e4a6f60bc3771fa0936dd6"


def plain(text):
    """Plain ASCII: straight quotes, `--` for dashes, no accents, no italics marks, single spaces."""
    table = {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2014": "--", "\u2013": "-"}
    text = text.translate(str.maketrans(table)).replace("\ufeff", "").replace("_", "")
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r" ([,.;:?!])(?=[ \"']|$)", r"\1", text)


@functools.cache
def is_slur(word):
    """Whether six letters in a row of a lower-case word are the slur."""
    return any(hashlib.sha256(word[i : i + 6].encode()).hexdigest() == SLUR for i in range(len(word) - 5))


def has_slur(paragraph):
    return any(map(is_slur, re.findall("[a-z]{6,}", paragraph.lower())))


def chapters(book):
    """The chapters of one plain-text book; what comes before the first heading is left out."""
    book = book.replace("\r\n", "\n")
    if (start := re.search(r"\*\*\* ?START OF .*\n", book)) is not None:
        book = book[start.end() :]
    if (end := re.search(r"\n(\*\*\* ?END OF|End of the Project|End of Project)", book)) is not None:
        book = book[: end.start()]
    out = [[]]
    for block in re.split(r"\n\s*\n", book):
        paragraph = plain(block)
        if HEADING.match(paragraph):
            out.append([])
        elif NUMBER.match(paragraph) or not re.search("[a-z]", paragraph) and paragraph[:1] != '"':
            continue  # a section's number, a line of capitals, a row of stars
        elif paragraph.lower() in ("finis", "the end") or has_slur(paragraph):
            continue
        else:
            # The first word of a chapter is often set in capitals.
            paragraph = re.sub(r"^[A-Z]{2,}(?= [a-z])", lambda m: m[0].capitalize(), paragraph)
            out[-1].append(paragraph)
    return [c for c in out[1:] if sum(map(len, c)) >= MIN_CHAPTER]


def osis_chapters(folder):
    """The chapters of a SWORD zText module with OSIS markup, one compressed block a book."""
    out = []
    for part in ("ot", "nt"):
        index, data = Path(folder, part + ".bzs").read_bytes(), Path(folder, part + ".bzz").read_bytes()
        for offset, length, _ in struct.iter_unpack("<III", index):
            text = zlib.decompress(data[offset : offset + length]).decode()
            if "<chapter" not in text:
                continue  # the module's title and preface
            for chapter in text.split("<chapter ")[1:]:
                chapter = re.sub(r"<(title|note)\b.*?</\1>", " ", chapter.split(">", 1)[1], flags=re.S)
                blocks = re.split(r'<div [^>]*type="x-p"[^>]*>', chapter)
                paragraphs = [plain(re.sub(r"<[^>]*>", "", re.sub(r"<l\b[^>]*>", " ", b))) for b in blocks]
                out.append([p for p in paragraphs if p])
    return [c for c in out if sum(map(len, c)) >= MIN_CHAPTER]


def sources(debs):
    site, go = debs / "usr/lib/R/site-library", debs / "usr/share/gocode/src/github.com"
    austen = rdata.variables(site / "janeaustenr/data")
    moby = rdata.variables(site / "tokenizers/data")["mobydick"]
    tests = go / "pierrec/lz4/testdata"
    return {
        "austen": [c for novel in sorted(austen) for c in chapters("\n".join(austen[novel]))],
        "melville": chapters("\n".join(moby)),
        "doyle": chapters((tests / "pg1661.txt").read_text()),
        "twain": chapters((tests / "Mark.Twain-Tom.Sawyer.txt").read_text()),
        "web": osis_chapters(debs / "usr/share/sword/modules/texts/ztext/engWEB2015eb"),
    }


# ---- chat -----------------------------------------------------------------------------------------


def exchanges(chapter):
    """Runs of paragraphs that are speech, as turns of a chat: the words spoken, the narration gone."""
    run, out = [], []
    for paragraph in chapter + [""]:
        speech = [s.strip() for s in re.findall(r'"([^"]+)(?:"|$)', paragraph)]
        spoken = " ".join(s for s in speech if s)
        if paragraph[:1] == '"' and len(spoken) > 0.6 * len(paragraph) and len(spoken) < 600:
            spoken = re.sub(r"[,;]$|--$", ".", spoken)
            run.append(spoken[0].upper() + spoken[1:])
            continue
        for at in range(0, len(run) - 1, 2):
            out.append(run[at : at + 2])
        run = []
    return out


def chat(turns):
    """The text that the chat template makes of a question and its answer."""
    roles = ("user", "assistant")
    return "".join(f"{TURN}{role}\n{text}{TURN_END}\n" for role, text in zip(roles, turns))


# ---- main -----------------------------------------------------------------------------------------


def train_tokenizer(texts, vocab_size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--debs", type=Path, required=True, help="folder that the packages were unpacked into")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab", type=int, default=4096)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    train, held = {}, {}
    for name, all_chapters in sources(args.debs).items():
        held[name] = ["\n\n".join(c) for i, c in enumerate(all_chapters) if i % HELD_OUT == HELD_OUT // 2]
        kept = [c for i, c in enumerate(all_chapters) if i % HELD_OUT != HELD_OUT // 2]
        train[name] = ["\n\n".join(c) for c in kept]
        if name != "web":
            train.setdefault("chat", []).extend(chat(t) for c in kept for t in exchanges(c))
        (args.out / f"{name}.txt").write_text("\n\n\n".join(train[name]))
    (args.out / "chat.txt").write_text("\n".join(train["chat"]))

    # The novels alone choose the vocabulary: it is their English that the model is to write.
    tokenizer = train_tokenizer((t for n in train if n not in ("web", "chat") for t in train[n]), args.vocab)
    tokenizer.save(str(args.out / "tokenizer.json"), pretty=False)
    end = tokenizer.token_to_id(END)
    arrays = {}
    for split, docs in (("train", train), ("val", held)):
        for name, texts in docs.items():
            ids = [i for e in tokenizer.encode_batch(texts) for i in e.ids + [end]]
            arrays[f"{split}_{name}"] = np.array(ids, dtype=np.uint16)
            size = sum(map(len, texts))
            print(f"{split:5} {name:8} {len(texts):5} documents {size:9,} characters {len(ids):9,} tokens")
    np.savez_compressed(args.out / "tokens.npz", **arrays)


if __name__ == "__main__":
    main()
