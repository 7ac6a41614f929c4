"""The command line: `rlhf-jax COMMAND`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

STAGES = ("sft", "reward", "ppo")
CONFIG_HELP = """CONFIG is a TOML file of configs/ or of your own. Every key can be changed behind it:
  rlhf-jax train configs/demo.toml run.dir=runs/mine sft.steps=200 ppo.kl_coef=0.05
"""
PLAN_HELP = """CONFIG is what `train` would be given; the models' config.json is all that is read of them. Examples:
  rlhf-jax plan configs/opt-1.3b-single_gpu.toml --gpus A100-80GB
  rlhf-jax plan mine.toml mesh.tensor=8 --gpus 8xA100-80GB --price-per-gpu-hour 2.5 --json
  rlhf-jax plan mine.toml --gpus 4x8xH100-80GB
With JAX's CUDA plugin installed the programs are compiled for the GPUs named; no GPU is needed. Without it they are
compiled for simulated CPUs, which is said.
"""
DATA_HELP = """CONFIG is what `train` would be given. What the model learns is bold green; where colours are not
possible it stands between brackets. Tokenised rows are kept, so that `train` finds them ready. Examples:
  rlhf-jax data configs/demo.toml
  rlhf-jax data mine.toml data.max_bad_rows=10 --examples 5
"""
IMPORT_HELP = """Examples:
  rlhf-jax import meta-llama/Llama-3.2-1B llama --adapter my-adapter --dtype bfloat16
  rlhf-jax export runs/mine assistant --dtype bfloat16
  rlhf-jax export runs/mine assistant-adapter --adapter
"""
ADAPTER_HELP = "a PEFT folder, whose LoRA adapter is added to the model"
DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 on success, 2 after a one-line error for what a user can mend."""
    parser = argparse.ArgumentParser(
        prog="rlhf-jax", description="Turn a pretrained language model into an assistant by human feedback."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, epilog: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=text, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    with_config = {
        "train": "all three stages in order, skipping what is finished, resuming what is not",
        "sft": "supervised fine-tuning alone",
        "reward": "the reward model alone",
        "ppo": "PPO alone, after sft and reward in the same run folder",
        "evaluate": "the finished run on held-out prompts: SFT beside PPO, and the reward model's accuracy",
    }
    for name, text in with_config.items():
        command = add(name, text, CONFIG_HELP)
        command.add_argument("config", metavar="CONFIG", help="a TOML file")
        command.add_argument("overrides", metavar="key=value", nargs="*", help="change a key of it, section.key=value")
    command = add("data", "what each source gives: counts, drops, lengths, and rows as the model sees them", DATA_HELP)
    command.add_argument("config", metavar="CONFIG", help="a TOML file")
    command.add_argument("overrides", metavar="key=value", nargs="*", help="change a key of it, section.key=value")
    command.add_argument("--examples", type=int, default=1, metavar="N", help="rows of each source (default: 1)")
    command = add("plan", "bytes, seconds and cost of every phase on GPUs that need not be there", PLAN_HELP)
    command.add_argument("config", metavar="CONFIG", help="a TOML file")
    command.add_argument("overrides", metavar="key=value", nargs="*", help="change a key of it, section.key=value")
    machine = "8xNAME, or nodes x GPUs as 4x8xNAME; an unknown NAME lists the known (default: this machine's GPUs, or "
    machine += "where it has none those that CONFIG's header names)"
    command.add_argument("--gpus", metavar="8xA100-80GB", help=machine)
    command.add_argument("--price-per-gpu-hour", type=float, default=0.0, metavar="PRICE", help="to tell the cost")
    command.add_argument("--json", action="store_true", help="everything, in bytes and seconds, as one JSON object")
    command = add("chat", "talk to an exported model in the terminal; /clear forgets the dialogue, /quit leaves")
    command.add_argument("folder", metavar="FOLDER", help="a Hugging Face folder, for example RUN/ppo/export")
    longest = "longest answer, in tokens (default: 256; never more than half of the model's positions)"
    command.add_argument("--max-new-tokens", type=int, default=256, help=longest)
    command.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1.0)")
    command.add_argument("--top-p", type=float, default=1.0, help="nucleus to draw from (default: 1.0, everything)")
    widths = "of weights, activations and cache; int8, nf4: kernels in 8.25 or 4.13 bits a weight, all else bfloat16"
    command.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "int8", "nf4"),
        help=f"{widths} (default: %(default)s)",
    )
    command.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    command.add_argument("--adapter", metavar="FOLDER", help=ADAPTER_HELP)
    command = add("import", "check a Hugging Face folder and write it anew: merged, in another dtype", IMPORT_HELP)
    command.add_argument("source", metavar="SRC", help="a folder with safetensors, or a hub id")
    command.add_argument("destination", metavar="DST", help="the folder to write, which is not there yet or empty")
    command.add_argument("--adapter", metavar="FOLDER", help=ADAPTER_HELP)
    command.add_argument("--dtype", choices=DTYPES, help="default: that of SRC")
    command = add("export", "hand on what a run has trained, as a Hugging Face folder or a PEFT adapter", IMPORT_HELP)
    command.add_argument("run", metavar="RUN", help="the run.dir of a training")
    command.add_argument("destination", metavar="DST", help="the folder to write, which is not there yet or empty")
    command.add_argument(
        "--stage", choices=("ppo", "sft", "reward", "critic", "ema"), default="ppo", help="default: ppo"
    )
    command.add_argument("--adapter", action="store_true", help="the LoRA adapter alone, as PEFT loads it")
    command.add_argument("--dtype", choices=DTYPES, help="of a whole model (default: that of the run's export)")

    args, late = parser.parse_known_args(argv)
    if late and (args.command not in ("plan", "data") or any(text.startswith("-") for text in late)):
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    if late:  # key=value behind an option, which argparse does not give to `overrides`
        args.overrides += late
    logging.basicConfig(format="%(message)s")  # before anything imported configures it otherwise
    logging.getLogger("rlhf_jax").setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch: it is not needed
    keep_compiled(os.environ)
    give_threads(os.environ)
    try:
        if args.command == "chat":
            run_chat(args)
        elif args.command == "plan":
            run_plan(args)
        elif args.command == "data":
            run_data(args)
        elif args.command == "import":
            from rlhf_jax.transfer import import_model

            import_model(args.source, args.destination, adapter=args.adapter, dtype=args.dtype)
        elif args.command == "export":
            from rlhf_jax.transfer import export_run

            export_run(args.run, args.destination, stage=args.stage, adapter=args.adapter, dtype=args.dtype)
        else:
            run_config(args.command, args.config, args.overrides)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"rlhf-jax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumes = args.command == "train" or args.command in STAGES
        hint = "; the same command goes on from the last checkpoint" if resumes else ""
        print(f"rlhf-jax: interrupted{hint}", file=sys.stderr)
        return 130
    return 0


def keep_compiled(environ: Mapping[str, str]) -> None:
    """Let JAX keep compiled programs in the user's cache folder, so that the next run need not compile them.

    JAX_COMPILATION_CACHE_DIR names another folder, and where it is empty none is kept: then JAX has read it already.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in environ:
        caches = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "rlhf_jax" / "compiled"))


def give_threads(environ: MutableMapping[str, str]) -> None:
    """Let XLA have more threads than simulated CPU devices, so that devices which wait for one another never fill them.

    One that waits in a collective holds a thread, and two collectives of a program may begin in another order on each
    device: with a thread a device, which is XLA's default, a run may then stand still.
    """
    if "xla_force_host_platform_device_count" in environ.get("XLA_FLAGS", ""):
        environ.setdefault("PJRT_NPROC", "64")


def run_config(command: str, path: str, overrides: Sequence[str]) -> None:
    """A command that reads a configuration file."""
    # Imported here, so that --help answers at once.
    from rlhf_jax.config import dump, load
    from rlhf_jax.evaluate import evaluate
    from rlhf_jax.mesh import make_mesh
    from rlhf_jax.plan import check_fits, device_limit
    from rlhf_jax.plan.choose import resolve
    from rlhf_jax.recipe import Recipe
    from rlhf_jax.stages.loop import open_run, same_data
    from rlhf_jax.stages.models import say_devices
    from rlhf_jax.stages.pipeline import train

    recipe = load(path, overrides, Recipe)
    mesh = make_mesh(recipe.mesh)
    if command == "evaluate":
        same_data(recipe.run, dump(recipe))
        say_devices(mesh, recipe.model)
        dtype, attention = recipe.model.dtype, recipe.model.attention
        evaluate(Path(recipe.run.dir), mesh, recipe.data, recipe.evaluate, dtype, attention)
        return
    stages = STAGES if command == "train" else (command,)
    # RUN/config.toml may be a CONFIG later, and must not ask for deletion once more; it keeps "auto" where that stands.
    lasting = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, overwrite=False))
    kept = () if recipe.run.overwrite else [stage for stage in stages if recipe.run.export(stage).exists()]
    limit, waiting = device_limit(mesh), [stage for stage in stages if stage not in kept]
    recipe, chosen = resolve(recipe, mesh, limit, waiting)
    for text in chosen:
        print(f"auto: {text}", flush=True)
    if limit is not None:
        check_fits(recipe, mesh, limit, waiting)
    open_run(recipe.run, dump(lasting))
    train(recipe.run, recipe.layout(mesh), recipe.model, recipe.data, recipe.sft, recipe.reward, recipe.ppo, stages)
    print(f"{command}: everything lies in {recipe.run.dir}", flush=True)
    if recipe.run.export("ppo").exists():
        print(f"talk to the result: rlhf-jax chat {recipe.run.export('ppo')}", flush=True)


def run_plan(args: argparse.Namespace) -> None:
    from rlhf_jax.config import load
    from rlhf_jax.plan import hardware_of, local_gpus, make_plan
    from rlhf_jax.plan.table import render
    from rlhf_jax.recipe import Recipe

    recipe = load(args.config, args.overrides, Recipe)
    if args.price_per_gpu_hour < 0:
        raise ValueError(f"--price-per-gpu-hour {args.price_per_gpu_hour:g}: at least 0")
    plan = make_plan(recipe, args.gpus or local_gpus(hardware_of(args.config)), args.price_per_gpu_hour)
    print(json.dumps(plan) if args.json else render(plan), flush=True)


def run_data(args: argparse.Namespace) -> None:
    from rlhf_jax.config import load
    from rlhf_jax.recipe import Recipe
    from rlhf_jax.show_data import show_data

    if args.examples < 0:
        raise ValueError(f"--examples {args.examples}: at least 0")
    show_data(load(args.config, args.overrides, Recipe), args.examples)


def run_chat(args: argparse.Namespace) -> None:
    from rlhf_jax.chat import chat
    from rlhf_jax.sampling import SampleConfig

    sample = SampleConfig(max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p)
    chat(args.folder, sample, args.seed, args.dtype, args.adapter)
