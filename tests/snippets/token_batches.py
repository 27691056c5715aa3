# >>> snippet: token_batches
PATTERN = 10_000  # places of a mixture in which each source has its share
COLUMNS = ("step", "tokens", "loss", "z_loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "held_out_loss", "bits_per_byte")
# Dense bf16 TFLOP/s and GB of the makers' data sheets; the first name that is part of the device's counts
GPUS = {"B200": (2250, 180), "H200": (989, 141), "H100": (989, 80), "H800": (989, 80), "H20": (148, 96), "GH200": (989, 96)}
GPUS |= {"A100-SXM4-40GB": (312, 40), "A100": (312, 80), "A800": (312, 80), "L40S": (362, 48), "A40": (150, 48), "L4": (121, 24)}
GPUS |= {"RTX 5090": (210, 32), "RTX 4090": (165, 24), "RTX 3090": (71, 24), "A10": (125, 24)}


def read_tokens(folder, tokenizer):
    """Return tokens.json of a folder, its files checked for their size and its ids for having come from `tokenizer`; SystemExit if not."""
    path = Path(folder, "tokens.json")
    try:
        tokens = json.loads(path.read_text(encoding="utf-8"))
        parts = [tokens["train"], *tokens["held_out"].values()]
        expected = {path.with_name(part["file"]): part["tokens"] * np.dtype(tokens["dtype"]).itemsize for part in parts}
        with open(Path(tokenizer, "tokenizer.json"), "rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == tokens["tokenizer_sha256"]
    except OSError as error:
        raise SystemExit(f"{STAGE}: {error.filename}: {error.strerror}; --input and --tokenizer want the folders of those stages") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"{STAGE}: {path}: not written by tokenize_corpus.py ({error!r}); run that stage again") from None
    if not same:
        raise SystemExit(f"{STAGE}: {tokenizer}/tokenizer.json did not write the ids of {folder}; give the tokenizer that did")
    for file, size in expected.items():
        found = file.stat().st_size if file.exists() else 0
        if found != size:
            raise SystemExit(f"{STAGE}: {file} has {found} bytes, {path.name} says {size}; run tokenize_corpus.py again")
    return tokens


class Sequences:
    """A map of tokens as rows of `length`. They are read, not mapped: a read lets other threads run while it waits for the disk."""

    def __init__(self, path, dtype, length):
        self.path, self.dtype, self.length = Path(path), np.dtype(dtype), length
        self.file = os.open(path, os.O_RDONLY)
        self.rows = self.path.stat().st_size // self.dtype.itemsize // length

    def read(self, rows):
        """Return the ids of `rows`, int64 [rows, length]."""
        ids = np.empty((len(rows), self.length), self.dtype)
        for row, place in zip(rows, ids, strict=True):
            os.preadv(self.file, [place], int(row) * place.nbytes)
        return ids.astype(np.int64)


def shuffled(numbers, size, key):
    """Return where the permutation `key` (a list of ints) of range(size) takes `numbers`.

    It is computed, not stored: a Feistel network on an even number of bits, walked on where it leads outside (Black and Rogaway 2002).
    """
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    turns = np.random.SeedSequence(key).generate_state(6, np.uint64)
    found, outside = np.asarray(numbers, np.uint64).copy(), np.arange(len(numbers))
    while len(outside):
        left, right = found[outside] >> half, found[outside] & mask
        for turn in turns:
            mixed = (right + turn) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ mixed >> np.uint64(32)) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, (left ^ mixed >> np.uint64(40)) & mask
        found[outside] = left << half | right
        outside = outside[found[outside] >= size]
    return found.astype(np.int64)


class Batches:
    """Which sequences a step takes, computed from the seed and its number alone: nothing has to be restored when a run goes on, and any
    number of processes takes the same ones. Each source is gone through in a new order each time, and has its share of every stretch."""

    def __init__(self, sources, weights, size, seed, skip=()):
        """`sources`: Sequences; `weights`: their shares, or None for their sizes; `size`: sequences a step; `skip`: batches left out."""
        self.sources, self.size, self.seed, self.skip = sources, size, seed, sorted(skip)
        shares = np.cumsum(weights or [source.rows for source in sources], dtype=float)
        places = np.searchsorted(shares / shares[-1], (np.arange(PATTERN) + 0.5) / PATTERN)
        self.pattern = np.random.default_rng(seed).permutation(places)
        counts = np.cumsum(self.pattern[:, None] == np.arange(len(sources)), axis=0)
        self.quota, self.before = counts[-1], counts[np.arange(PATTERN), self.pattern] - 1

    def number(self, step):
        """Return the number of the batch that `step` takes; both count from 1."""
        for left_out in self.skip:
            step += left_out <= step
        return step

    def rows(self, step):
        """Return (source, row) of each sequence of a step: two arrays."""
        places = np.arange(self.size) + (self.number(step) - 1) * self.size
        which = self.pattern[places % PATTERN]
        taken = places // PATTERN * self.quota[which] + self.before[places % PATTERN]
        rows = np.empty_like(taken)
        for index in np.unique(which):
            size = self.sources[index].rows
            for epoch in np.unique(taken[which == index] // size):
                here = (which == index) & (taken // size == epoch)
                rows[here] = shuffled(taken[here] % size, size, [self.seed, int(index), int(epoch)])
        return which, rows

    def read(self, step, rank=0, processes=1):
        """Return the ids of the part that process `rank` has of a step, int64 [sequences, length]."""
        share = self.size // processes
        which, rows = (found[rank * share : (rank + 1) * share] for found in self.rows(step))
        ids = np.empty((share, self.sources[0].length), np.int64)
        for index in np.unique(which):
            ids[which == index] = self.sources[index].read(rows[which == index])
        return ids

    def stream(self, first, last, rank=0, processes=1):
        """Yield read() of the steps first … last; the next one is read while the one before is at work."""
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self.read, first, rank, processes)
            for step in range(first, last + 1):
                ids, ahead = ahead.result(), reader.submit(self.read, min(step + 1, last), rank, processes)
                yield ids


def documents(sequences, rows):
    """Yield (row, the document's entry in the index of a map) for each document that has tokens in one of `rows`."""
    index, wanted = sequences.path.with_suffix(".csv.gz"), set(map(int, rows))
    if index.exists():
        with gzip.open(index, "rt", encoding="utf-8", newline="") as file:
            for start, end, identity, source, line in csv.reader(file):
                touched = range(int(start) // sequences.length, (int(end) - 1) // sequences.length + 1)
                entry = {"start": int(start), "end": int(end), "id": identity, "source": source, "line": int(line)}
                yield from ((row, entry) for row in touched if row in wanted)


def learning_rate(args, step):
    """Return the learning rate of a step, the same for both engines: a rise from 0, then what --schedule says, down to --final-rate."""
    if step < args.warmup:
        return args.learning_rate * step / args.warmup
    left = (args.steps - step) / max(1, args.steps - args.warmup)
    tail = min(1, (args.steps - step) / max(1, round(args.decay * args.steps)))
    share = {"constant": 1, "linear": left, "cosine": (1 + math.cos(math.pi * (1 - left))) / 2, "wsd": tail}[args.schedule]
    return args.learning_rate * (args.final_rate + (1 - args.final_rate) * share)


def peak_flops(device, precision):
    """Return the FLOP/s at which a process can multiply at most: of a known GPU by its data sheet, of a CPU measured; None if unknown."""
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((figures for gpu, figures in GPUS.items() if gpu in name), None)
        return known[0] * 1e12 if known and precision == "amp_bf16" else None
    one = torch.randn(1024, 1024, dtype=torch.bfloat16 if precision == "amp_bf16" else torch.float32)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        one @ one
        seconds.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(seconds)


def pooled(losses, counts, place=0, kind=None):
    """Return {"loss", "bits_per_byte"} of those (source, language) in `losses` that have `kind` at `place`, or of all: nats a token by
    tokens, and bits a byte of text."""
    names = [name for name in losses if kind in (None, name[place])]
    nats = sum(losses[name] * counts[name]["tokens"] for name in names)
    tokens, size = (sum(counts[name][unit] for name in names) for unit in ("tokens", "bytes"))
    return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / size}


def plot(steps, held_out, path):
    """Draw [(step, loss, learning rate)] and [(step, held-out loss)]."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    numbers, losses, rates = zip(*steps, strict=True)
    axes.plot(numbers, losses, linewidth=1, label="training")
    axes.plot(*zip(*held_out, strict=True), marker=".", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    rate = axes.twinx()
    rate.plot(numbers, rates, color="gray", linestyle=":", linewidth=1)
    rate.set(ylabel="learning rate (dotted)", ylim=(0, None))
    with write_atomic(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


# <<<
