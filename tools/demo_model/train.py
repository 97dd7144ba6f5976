"""Trains the demo model from scratch within a budget of wall-clock time.

    python3 train.py --out DIR --seconds 400            writes DIR/model (the Hugging Face folder), DIR/master.safetensors, DIR/training.json
    python3 train.py --out DIR --seconds 300 --resume master.safetensors      goes on from float32 weights

The learning rate rises, stays, and falls to zero by the clock. Worker processes write the conversations while the model learns; the
mixture leans towards the skills that still fail on validation items. Validation is teacher-forced: a greedy answer is exact if and only if
the most likely token is right at every place of the right answer, so one forward pass gives the greedy accuracy.
"""

import argparse
import itertools
import multiprocessing
import os
import queue
import sys
import threading
import time
from pathlib import Path

STARTED = time.time()
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import generate  # noqa: E402  (no torch: the workers start before it is imported)


def work(index, args, shares, progress, out):
    """A worker process: puts batches into its own queue, for ever."""
    stream = generate.training_batches(
        args.seed, index, args.rows, args.length, ends_size(args), lambda: list(shares), lambda: progress.value)
    while True:
        out.put(tuple(next(stream)))


def ends_size(args):
    """Room for conversations in a batch. Typically 7 a row; every empty place costs the attention kernel blocks that only leave."""
    return args.rows * args.length // 64


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seconds", type=float, default=400, help="wall time from the start of the process to the saved weights")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=0.012, help="peak learning rate of the matrices (Muon)")
    parser.add_argument("--adam-rate", type=float, default=0.002, help="peak learning rate of embedding, biases and norms (AdamW)")
    parser.add_argument("--decay", type=float, default=0.45, help="share of the time in which the rate falls to zero")
    parser.add_argument("--workers", type=int, default=max(1, len(os.sched_getaffinity(0)) - 2))
    parser.add_argument("--device", default=None)
    parser.add_argument("--validation-items", type=int, default=160)
    parser.add_argument("--report-seconds", type=float, default=15)
    parser.add_argument("--resume", type=Path, help="master.safetensors of an earlier run (or the folder that holds it)")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--test-items", type=int, default=500, help="items per skill of the final evaluation; 0: none")
    return parser.parse_args()


def start_workers(args):
    context = multiprocessing.get_context("fork")
    base = [share for _, share in generate.SKILLS.values()]
    shares, progress = context.Array("d", base, lock=False), context.Value("d", 1.0 if args.resume else 0.0, lock=False)
    queues, processes = [], []
    for index in range(args.workers):
        out = context.Queue(4)
        process = context.Process(target=work, args=(index + (1000 if args.resume else 0), args, shares, progress, out), daemon=True)
        process.start()
        queues.append(out)
        processes.append(process)
    return shares, progress, queues, processes


def main():
    args = arguments()
    shares, progress, queues, processes = start_workers(args)

    import torch

    import folder
    import network as net

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = device.type == "cuda"
    if not cuda:
        torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    flash = cuda and net.flash_works(device)
    torch.manual_seed(args.seed)
    shape = net.Shape()
    model = net.Network(shape, torch.bfloat16 if cuda else torch.float32, net.flash_attention if flash else net.masked_attention).to(device)
    weights = sum(value.numel() for value in model.parameters())
    print(f"{weights} weights ({2 * weights / 1e6:.2f} MB in bf16), {device}, torch {torch.__version__}, {args.workers} workers, "
          f"{'flash' if flash else 'masked'} attention", flush=True)
    if args.resume:
        from safetensors.torch import load_file

        path = args.resume / "master.safetensors" if args.resume.is_dir() else args.resume
        stored = load_file(str(path))
        with torch.no_grad():
            for name, value in model.named_weights():
                value.copy_(stored.pop(name))
        assert not stored, f"{path} holds other weights too: {list(stored)}"
        print(f"resumed from {path}", flush=True)

    ready = queue.Queue(6)

    def gather():
        turn = 0
        while True:
            batch = [torch.from_numpy(array) for array in queues[turn % len(queues)].get()]
            ready.put([array.pin_memory() for array in batch] if cuda else batch)
            turn += 1

    threading.Thread(target=gather, daemon=True).start()

    def place(batch):
        tokens, targets, positions, ends = (array.to(device, non_blocking=True) for array in batch)
        return tokens.reshape(-1).int(), targets.reshape(-1).long(), net.where(positions.int(), ends, masked=not flash)

    validation = exam_batches(args, "validation", args.validation_items)
    muon = net.Muon(model.matrices())
    adam = torch.optim.AdamW(model.others(), lr=args.adam_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=cuda)
    names = list(generate.SKILLS)
    base = [share for _, share in generate.SKILLS.values()]

    def step(loss_of, scale):
        loss = loss_of(*place(ready.get()))
        loss.backward()
        muon.step(args.rate * scale)
        for group in adam.param_groups:
            group["lr"] = args.adam_rate * scale
        adam.step()
        for value in model.parameters():
            value.grad = None
        return loss.detach()

    loss_of = model.loss
    if cuda and not args.no_compile:
        try:
            compiled = torch.compile(model.loss, dynamic=False)
            step(compiled, 0.0)
            torch.cuda.synchronize()
            loss_of = compiled
            print(f"compiled, {time.time() - STARTED:.0f} s after the start", flush=True)
        except Exception as error:  # slower, not different
            print(f"runs without torch.compile: {str(error)[:400]}", flush=True)
            for value in model.parameters():
                value.grad = None

    def examine(batches):
        """Greedy accuracy by skill, teacher-forced."""
        right, total = [0] * len(names), [0] * len(names)
        with torch.no_grad():
            for batch, skills in batches:
                tokens, targets, at = place([torch.from_numpy(array) for array in batch])
                wrong = (model.logits(tokens, at).argmax(-1) != targets) & (targets >= 0)
                number = (at.positions == 0).long().cumsum(0) - 1
                counts = torch.zeros(2, int(number[-1]) + 1, device=device)
                counts[0].index_add_(0, number, wrong.float())
                counts[1].index_add_(0, number, (targets >= 0).float())
                missed, asked = counts.cpu()
                for skill, errors in zip(skills, missed[asked > 0].tolist(), strict=True):
                    total[skill] += 1
                    right[skill] += errors == 0
        return {name: r / t for name, r, t in zip(names, right, total)}

    args.out.mkdir(parents=True, exist_ok=True)
    begun, deadline = time.time(), STARTED + args.seconds - (5 if cuda else 2)
    log, steps, lost, counted, scale_down = [], 0, torch.zeros((), device=device), 0, 1.0
    error = [1.0] * len(names)
    snapshot = [value.detach().clone() for value in model.parameters()]
    reported = begun
    while True:
        now = time.time()
        done = (now - begun) / max(1e-9, deadline - begun)
        if now - reported >= args.report_seconds or done >= 1:
            reported, average = now, (lost / max(1, counted)).item()
            lost, counted = torch.zeros((), device=device), 0
            with torch.no_grad():
                if average == average and average < 1e3:
                    for kept, value in zip(snapshot, model.parameters()):
                        kept.copy_(value)
                else:
                    print("the loss is not a number: back to the last good weights, at half the rate", flush=True)
                    for kept, value in zip(snapshot, model.parameters()):
                        value.copy_(kept)
                    scale_down *= 0.5
                    muon = net.Muon(model.matrices())
                    adam = torch.optim.AdamW(model.others(), lr=args.adam_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=cuda)
            accuracy = examine(validation)
            error = [0.5 * old + 0.5 * (1 - accuracy[name]) for old, name in zip(error, names)]
            for i, share in enumerate(base):
                shares[i] = share * (0.3 + min(1.2, 4 * error[i]))
            log.append({"seconds": round(now - STARTED, 1), "steps": steps, "loss": average, "validation": accuracy})
            shown = " ".join(f"{name} {100 * value:.1f}" for name, value in accuracy.items())
            print(f"{now - STARTED:5.0f} s  step {steps:6d}  loss {average:.4f}  {shown}", flush=True)
            if done >= 1:
                break
            now = time.time()
            done = (now - begun) / (deadline - begun)
        progress.value = max(progress.value, min(1.0, done))
        scale = scale_down * min(1.0, steps / 100, max(0.0, 1 - done) / args.decay)
        lost += step(loss_of, scale)
        steps, counted = steps + 1, counted + 1

    for process in processes:
        process.terminate()
    from safetensors.torch import save_file

    save_file({name: value.detach().cpu().contiguous() for name, value in model.named_weights()}, str(args.out / "master.safetensors"))
    folder.write_folder(args.out / "model", model)
    record = {
        "command": [*sys.argv[:1], *sys.argv[1:]], "seed": args.seed, "steps": steps, "tokens": steps * args.rows * args.length,
        "seconds": round(time.time() - begun, 1), "weights": weights, "shape": shape.as_dict(), "resumed": bool(args.resume),
        "device": torch.cuda.get_device_name() if cuda else "CPU", "torch": torch.__version__, "log": log,
    }
    record["command"][0] = Path(record["command"][0]).name
    folder.dump(args.out / "training.json", record)
    print(f"saved {args.out / 'model'}, {time.time() - STARTED:.0f} s after the start", flush=True)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(value.bfloat16())
    if args.test_items:
        forced = examine(exam_batches(args, "test", args.test_items))
        print("bf16 weights, test items, teacher-forced: " + " ".join(f"{k} {100 * v:.1f}" for k, v in forced.items()), flush=True)
        import evaluate

        record["test"] = evaluate.evaluate(args.out / "model", args.test_items, args.seed, str(device))
        folder.dump(args.out / "training.json", record)
    sys.stdout.flush()
    if loss_of is not model.loss and cuda:
        try:  # they hold the output pipe open
            from torch._inductor.async_compile import shutdown_compile_workers

            shutdown_compile_workers()
        except Exception as error:
            print(f"compile workers: {error}", flush=True)
    os._exit(0)  # the reading thread and the workers hold nothing worth waiting for


def exam_batches(args, split, count):
    """[(batch, skill of each of its conversations)] over all skills."""
    numbers, documents = {}, []
    for number, name in enumerate(generate.SKILLS):
        for item in generate.exam(name, split, args.seed, count):
            documents.append(generate.encode([(item.user, item.answer)]))
            numbers[id(documents[-1])] = number
    batches, left, stream = [], [], iter(documents)
    while True:
        batch, placed, left = generate.pack(itertools.chain(left, stream), args.rows, args.length, ends_size(args))
        if not placed:
            return batches
        batches.append((batch, [numbers[id(document)] for document in placed]))


if __name__ == "__main__":
    main()
