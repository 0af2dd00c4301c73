"""Stage I, anchor optimization (Sec. 3.2.1, Fig. 2a, the first loop of Algorithm 1).

    python stage1.py --dataset toy                                      seconds on a CPU, nothing to download
    python stage1.py --dataset caltech101 --root $DATA --nearest 10     the paper's anchor, and words near it

Learns the anchor tokens [Anc_1]..[Anc_N] of "{Anc} of {Class}" from class descriptions alone: no image is
read. Every step takes all base classes at once, against the mean of each class's description features,
which is Eq. 5 exactly (losses.anchor_mse). Descriptions of novel classes never reach the anchor.
stage2.py runs this by itself where the anchor is missing.
"""

import argparse
import contextlib
import hashlib
import json
import math
import sys
import time

import torch
from tqdm import tqdm

import data
import eval as evaluation
import losses
from anchor import AnchorPrompt, load_anchor, nearest_words, save_anchor
from prompts import encode_sentences, load_clip, unit


def learning_rate(epoch, epochs, lr):
    """The schedule of both stages: epoch 1 warms up at 1e-5, epoch e >= 2 is at lr (1 + cos(pi (e - 2) / T)) / 2.

    epoch counts from 1; T = epochs.
    """
    return 1e-5 if epoch == 1 else 0.5 * lr * (1 + math.cos(math.pi * (epoch - 2) / epochs))


def scaled_backward(loss, tokens):
    """loss.backward() for tokens.grad, times 2^8 on the way: Eq. 5's gradients of many classes are too small for float16."""
    (256 * loss).backward()
    tokens.grad /= 256


def learn_anchor(prompt, targets, epochs, steps, lr, weight, variance=0.0, checkpoint=None, digest=""):
    """Minimises  weight * L_theta_a  (Eq. 5) over the anchor tokens theta_a, and nothing else.

    prompt: an `anchor.AnchorPrompt` of the C base classes, changed in place. targets (C, d): the means of their unit
    description features, not renormalised. epochs, steps: steps a epoch; each takes all classes. lr, weight: the
    learning rate and the factor before the loss. variance: the constant that completes the reported loss
    (`losses.description_variance`). checkpoint: None, or a file that keeps every finished epoch; where it holds
    some, learning goes on from there, if it was begun with the same digest (of the descriptions).
    Returns the log: a dict per epoch (epoch, lr, loss, seconds). Raises ValueError when the loss is not
    finite, with the tokens put back to the last good epoch.
    """
    optimizer = torch.optim.SGD([prompt.tokens], lr=lr, momentum=0.9, weight_decay=5e-4)
    state = {"prompt": prompt, "optimizer": optimizer, "digest": evaluation.Unchanged("descriptions", digest)}
    log = [] if checkpoint is None else evaluation.resume(checkpoint, state, prompt.tokens.device)
    bar = tqdm(total=epochs * steps, initial=len(log) * steps, desc="stage I ", unit="step", disable=None)
    for epoch in range(len(log) + 1, epochs + 1):
        evaluation.at_work_on(f"Stage I, epoch {epoch} of {epochs}")
        start, last_good = time.perf_counter(), prompt.tokens.detach().clone()
        optimizer.param_groups[0]["lr"] = learning_rate(epoch, epochs, lr)
        epoch_losses = []
        for _ in range(steps):
            loss = losses.anchor_mse(prompt(), targets)                                         # Eq. 5
            optimizer.zero_grad()
            scaled_backward(weight * loss, prompt.tokens)
            optimizer.step()
            epoch_losses.append(loss.detach())
        epoch_losses = torch.stack(epoch_losses).cpu()         # read once an epoch: a step waits for nobody
        if not epoch_losses.isfinite().all():
            prompt.tokens.data.copy_(last_good)
            step = int((~epoch_losses.isfinite()).nonzero()[0]) + 1
            raise ValueError(f"Stage I: the loss is not finite in epoch {epoch}, step {step}; epoch {epoch - 1} is kept; "
                             "lower --anchor-lr or --anchor-weight")
        log.append({"epoch": epoch, "lr": optimizer.param_groups[0]["lr"],
                    "loss": weight * (epoch_losses.mean().item() + variance), "seconds": time.perf_counter() - start})
        if checkpoint is not None:
            with evaluation.written_aside(checkpoint) as aside:
                torch.save({key: part.state_dict() for key, part in state.items()} | {"log": log}, aside)
        bar.update(steps)
        bar.set_postfix(loss=f"{log[-1]['loss']:.4f}")
    bar.close()
    return log


def description_features(clip_model, descriptions):
    """The frozen targets of Eq. 5: a list of C tensors (D_c, d), the unit features of each class's sentences."""
    flat = unit(encode_sentences(clip_model, [sentence for sentences in descriptions for sentence in sentences]))
    return list(flat.split([len(sentences) for sentences in descriptions]))


def sentences_digest(sentences):
    """A short name for the sentences (C lists) that an anchor was learnt from."""
    return hashlib.sha256(json.dumps(sentences).encode()).hexdigest()[:16]


def find_or_learn_anchor(clip_model, class_names, args, settings, seed):
    """The anchor tokens (N, d_t) of these settings and this seed: read where they are, else learnt and saved.

    Only one process learns an anchor; others that need it wait. Raises what the files and Stage I raise.
    """
    folder = evaluation.anchor_folder(args.output, settings, seed)
    file, own = folder / "anchor.pt", {key: settings[key] for key in evaluation.ANCHOR_SETTINGS}

    def read_sentences():
        return data.load_descriptions(args.descriptions or data.default_descriptions(settings["dataset"]), class_names,
                                      settings["max_descriptions"], args.aliases)

    with evaluation.locked(folder, wait=True, what="the anchor"):
        if file.exists():
            (folder / "last.pt").unlink(missing_ok=True)        # of a process killed just before it did so
            tokens, saved = load_anchor(file)
            check_anchor(file, tokens, saved, settings, clip_model, class_names)
            digest = saved.get("sentences")
            with contextlib.suppress(OSError, ValueError):              # an anchor outlives its descriptions
                digest = sentences_digest(read_sentences())
            if saved.get("sentences", digest) != digest:
                raise ValueError(f"{file} was learnt from other descriptions than the file holds now; "
                                 f"choose another --output, or remove {folder}")
            print(f"anchor found: {file}", flush=True)
            return tokens
        print(f"no anchor at {file} yet: Stage I learns it now", flush=True)
        sentences = read_sentences()
        features = description_features(clip_model, sentences)
        torch.manual_seed(seed)
        prompt = AnchorPrompt(clip_model, class_names, settings["anchor_length"], settings["preposition"], args.class_chunk)
        steps = max(1, settings["shots"] * len(class_names) // 32)      # as if images came in batches of 32

        def cosine():
            with torch.no_grad():
                return torch.stack([(anchor * f).sum(-1).mean() for anchor, f in zip(prompt(), features)]).mean().item()
        before = cosine()
        log = learn_anchor(prompt, torch.stack([f.mean(0) for f in features]), settings["anchor_epochs"], steps,
                           settings["anchor_lr"], settings["anchor_weight"],
                           losses.description_variance(features).item(), folder / "last.pt", sentences_digest(sentences))
        evaluation.save_log(folder / "log.csv", log)
        with evaluation.written_aside(file) as aside:
            own |= {"class_names": list(class_names), "sentences": sentences_digest(sentences)}
            save_anchor(aside, prompt.tokens, own)
        (folder / "last.pt").unlink(missing_ok=True)
        print(f"Stage I done: cosine of anchor prompts and descriptions {before:.3f} -> {cosine():.3f}; {file}", flush=True)
        return prompt.tokens.detach()


def check_anchor(file, tokens, saved, settings, clip_model, class_names=None):
    """Raises ValueError where an anchor file does not fit what is asked for: says both values and what to do."""
    command = (f"make the right one with: python stage1.py --dataset {settings['dataset']} --clip CLIP "
               f"--anchor-length {settings['anchor_length']} --preposition {settings['preposition']}")
    width = clip_model.token_embedding.weight.shape[1]
    facts = [("token width", tokens.shape[1], width), ("anchor length", len(tokens), settings["anchor_length"])]
    facts += [(key.replace("_", " "), saved[key], settings[key]) for key in ("preposition", "clip") if key in saved]
    if class_names is not None and "class_names" in saved:
        learnt_on = saved["class_names"] if isinstance(saved["class_names"], list) else []
        if learnt_on != list(class_names):
            raise ValueError(f"{file} was learnt on {len(learnt_on)} classes, not on these {len(class_names)}; {command}")
    for what, found, wanted in facts:
        if found != wanted:
            raise ValueError(f"{file} has {what} {found}, asked for is {wanted}; {command}")


def add_arguments(parser):
    """The options that Stage I and Stage II share. None stands for the default of the dataset's row."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="toy", help=f"one of {', '.join(data.DATASETS)} (default: toy)")
    group.add_argument("--root", help="folder that holds the datasets (default: the environment's DATA, else ./data)")
    group.add_argument("--shots", type=int, help="training images a class (default: 16)")
    group.add_argument("--classes", choices=("base", "all"), help="classes to learn on (default: base)")
    group.add_argument("--seeds", type=int, nargs="+", default=[1], help="one run each (default: 1)")
    group.add_argument("--descriptions", help="JSON file, class -> sentences (default: assets/descriptions/DATASET.json)")
    group.add_argument("--aliases", help="JSON file, class -> its key in the description file (default: none)")
    group.add_argument("--max-descriptions", type=int, help="sentences a class, the first in the file (default: 10)")
    group = parser.add_argument_group("anchor, Stage I")
    group.add_argument("--anchor-length", type=int, help="N anchor tokens, Tab. 7 (default: 1)")
    group.add_argument("--preposition", help="of, with, at, sun, sea, any word, or none: Tabs. 6 and S2 (default: of)")
    group.add_argument("--anchor-epochs", type=int, help="length of Stage I (default: the dataset's row)")
    group.add_argument("--anchor-lr", type=float, help="learning rate of Stage I (default: 0.002)")
    group.add_argument("--anchor-weight", type=float, help="factor before Eq. 5 (default: the dataset's row)")
    group = parser.add_argument_group("machine")
    group.add_argument("--clip", help="CLIP's name or a checkpoint (default: ViT-B/16; the toy CLIP for --dataset toy)")
    group.add_argument("--device", default=evaluation.default_device(), help="cpu, cuda, cuda:1, mps (default: %(default)s)")
    group.add_argument("--dtype", choices=("float32", "float16", "bfloat16"),
                       help="of the frozen CLIP (default: float16 on CUDA, else float32)")
    group.add_argument("--class-chunk", type=int, default=0,
                       help="encode this many classes at a time and recompute them backward, to save memory (default: 0, all)")
    group.add_argument("--output", default="output", help="folder that all runs are written to (default: output)")


def use_threads(settings):
    if settings["clip"] == "toy":                  # its layers are so small that a second thread costs more than it brings
        torch.set_num_threads(1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--nearest", type=int, default=0, metavar="K",
                        help="print the K vocabulary words nearest to each anchor token, S4 (default: 0)")
    args = parser.parse_args(argv)
    return evaluation.run_script("stage1.py", lambda: run(args), args.device)


def run(args):
    dataset = data.load_dataset(args.dataset, args.root)
    if not dataset.train:
        raise ValueError(f"{args.dataset} is for testing alone; learn the anchor on another dataset, e.g. imagenet")
    settings = evaluation.resolve(args, evaluation.default_settings(args.dataset, "coop", "anchoropt"))
    for note in dataset.notes:
        print(f"note: {note}")
    use_threads(settings)
    labels = data.split_base_novel(dataset.class_names)[0] if settings["classes"] == "base" else range(len(dataset.class_names))
    evaluation.check_output(args.output)
    clip_model = load_clip(args.clip or settings["clip"], args.device, args.dtype and getattr(torch, args.dtype))
    for seed in args.seeds:
        tokens = find_or_learn_anchor(clip_model, [dataset.class_names[label] for label in labels], args, settings, seed)
        if args.nearest:
            print("nearest vocabulary words (Euclidean distance); they make no sense to a person, as the paper finds (S4):")
            for i, words in enumerate(nearest_words(tokens, clip_model, args.nearest)):
                print(f"  [Anc_{i + 1}]  " + "  ".join(f"{word} {distance:.2f}" for word, distance in words))


if __name__ == "__main__":
    sys.exit(main())
