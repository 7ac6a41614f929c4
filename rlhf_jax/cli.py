"""The command line: `rlhf-jax COMMAND`."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import logging
import os
import sys
import tomllib
import traceback
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from rlhf_jax import options
from rlhf_jax.redact import redact
from rlhf_jax.stages.table import STAGES, latest_export

LOGGER = logging.getLogger(__name__)
Run = Callable[[argparse.Namespace], int | None]  # the exit code; None: 0
PLAN_EXITS = {True: 0, False: 1, None: 3}  # fits, does not fit, cannot tell without the plugin


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 on success, 2 after a one-line error that the user can fix; a plan also PLAN_EXITS.

    A run that was stopped and continues with the same command: 75, or 130 after Ctrl-C.
    """
    args = parse_args(argv)

    import jax  # from here on imported where used, so that help texts and wrong command lines take no seconds

    from rlhf_jax import hosts
    from rlhf_jax.stages.stopping import EXIT_INTERRUPTED, StopRun

    set_logging(args)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # about missing torch, which is not needed
    set_compile_cache(os.environ)
    set_xla_flags(os.environ)
    try:
        if args.run in (run_train, run_evaluate):
            keep_freed_memory(os.environ)
            hosts.start(os.environ)
            set_logging(args)  # again: now it is known which process this is
        return args.run(args) or 0
    except (ValueError, FloatingPointError, OSError) as error:
        message = " ".join(str(error).split())
        LOGGER.error(f"rlhf-jax: {message}")
        hosts.fail(message, 2)
        return 2
    except jax.errors.JaxRuntimeError as error:
        if hosts.count() > 1:
            hosts.lose(error)
        raise
    except Exception as error:
        if hosts.count() > 1:  # reported here, because the process then ends at once
            traceback.print_exc()
            hosts.fail(f"{type(error).__name__}: {error}", 1)
        raise
    except StopRun as stop:
        LOGGER.warning(f"rlhf-jax: {stop}")
        hosts.fail(str(stop), stop.code)
        return stop.code
    except KeyboardInterrupt:
        hint = "; the same command resumes from the last checkpoint" if args.run is run_train else ""
        LOGGER.warning(f"rlhf-jax: interrupted{hint}")
        hosts.fail("interrupted", EXIT_INTERRUPTED)  # an orderly exit would wait for the other processes
        return EXIT_INTERRUPTED


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `run` of the result is the function of the command."""
    parser = argparse.ArgumentParser(
        prog="rlhf-jax",
        description="Turn a pretrained language model into an assistant by human feedback.",
        parents=[options.log_options()],
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Run, text: str, epilog: str = "", *, config: bool = False) -> argparse.ArgumentParser:
        texts = dict(help=text, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
        command = commands.add_parser(name, **texts, parents=[options.log_options()])
        command.set_defaults(run=run)
        if config:
            command.add_argument("config", metavar="CONFIG", help="a TOML file")
            command.add_argument("overrides", metavar="key=value", nargs="*", help="override a key, section.key=value")
        return command

    every = "all stages of the run in order, skipping finished stages and resuming unfinished ones"
    for name, text in {"train": every, **{name: stage.help for name, stage in STAGES.items()}}.items():
        add(name, run_train, text, options.CONFIG_HELP, config=True)
    text = "the finished run on held-out prompts: its policies side by side, and the reward model's accuracy"
    text += "; or any models side by side on any prompts"
    options.add_evaluate_options(add("evaluate", run_evaluate, text, options.EVALUATE_HELP, config=True))
    text = "a reward model's scores for the texts, dialogues or pairs of a file"
    options.add_score_options(add("score", run_score, text, options.SCORE_HELP))
    text = "what each source gives: counts, drops, lengths, and rows as the model sees them"
    command = add("data", run_data, text, options.DATA_HELP, config=True)
    command.add_argument("--examples", type=int, default=1, metavar="N", help="rows of each source (default: 1)")
    text = "bytes, seconds and cost of every phase on GPUs that need not be attached"
    options.add_plan_options(add("plan", run_plan, text, options.PLAN_HELP, config=True))
    command = add("report", run_report, "a page on one run, or on several drawn over each other", options.REPORT_HELP)
    command.add_argument("runs", metavar="RUN", nargs="+", help="the run.dir of a training")
    command.add_argument("--output", metavar="FILE", help="default: report.html in the first RUN")
    text = "what was sampled in training, with filters"
    options.add_rollouts_options(add("rollouts", run_rollouts, text, options.ROLLOUTS_HELP))
    text = "talk to an exported model in the terminal; /help lists the commands there"
    options.add_chat_options(add("chat", run_chat, text))
    text = "answer requests of OpenAI's HTTP API with exported models, and score texts with reward models"
    options.add_serve_options(add("serve", run_serve, text, options.SERVE_HELP))
    text = "check a Hugging Face folder and write it again: merged, in another dtype"
    command = add("import", run_import, text, options.IMPORT_HELP)
    text = "export a trained model of a run as a Hugging Face folder or a PEFT adapter"
    options.add_folder_options(command, add("export", run_export, text, options.IMPORT_HELP))

    args, late = parser.parse_known_args(argv)
    if late and ("overrides" not in args or any(text.startswith("-") for text in late)):
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    if late:  # key=value after an option, which argparse does not give to `overrides`
        args.overrides += late
    return args


class Terminal(logging.Handler):
    """Writes messages to stderr, without secrets, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(redact(self.format(record)), file=sys.stderr)
        sys.stderr.flush()


class JsonFormatter(logging.Formatter):
    """A message as one JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        time = self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z")
        fields = {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        return json.dumps(fields, ensure_ascii=False)


def set_logging(args: argparse.Namespace) -> None:
    """Send all messages to stderr, those of this package from INFO up, or with --quiet from WARNING up."""
    from rlhf_jax import hosts

    is_quiet, is_json = "quiet" in args, "json_logs" in args
    root, terminal = logging.getLogger(), Terminal()
    terminal.setFormatter(JsonFormatter() if is_json else None)
    # An imported library may have installed a handler of its own, and an earlier call did.
    others = [each for each in root.handlers if type(each) not in (logging.StreamHandler, Terminal)]
    root.handlers = [*others, terminal]
    logging.captureWarnings(is_json)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax writes a traceback of every error that it raises too
    level = logging.WARNING if is_quiet else logging.INFO
    # What all processes would say is said by the main one.
    logging.getLogger("rlhf_jax").setLevel(level if hosts.is_main() else logging.ERROR)
    logging.getLogger("rlhf_jax.metrics.bar").disabled = is_quiet or is_json


def set_compile_cache(environ: Mapping[str, str]) -> None:
    """Let JAX keep compiled programs in the user's cache folder, so that the next run need not compile them.

    JAX_COMPILATION_CACHE_DIR names another folder, or if empty disables the cache; JAX has read it already.
    Programs that took a tenth of a second are kept, where JAX's default is a second: a run has many.
    """
    import jax

    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if "JAX_COMPILATION_CACHE_DIR" not in environ:
        caches = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "rlhf_jax" / "compiled"))


def set_xla_flags(environ: MutableMapping[str, str]) -> None:
    """Set what XLA reads from the environment when it is first used; what the user has set stays.

    On CPUs it orders the operations of a program for many at once by default. In an order for little memory training
    is about as fast; and in jaxlib 0.10.2 simulated devices that run a program from the compilation cache may wait for
    each other forever in the default order (docs/measurements.md).
    Simulated devices get more threads than devices: one that waits in a collective holds a thread, and two collectives
    of a program may start in a different order on each, so that with XLA's default, a thread each, all may wait.
    """
    flags = environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" in flags:
        environ.setdefault("PJRT_NPROC", "64")
    if _is_cpu_alone(environ) and _ORDER_FLAG not in flags:
        environ["XLA_FLAGS"] = f"{flags} --{_ORDER_FLAG}=false".strip()


_ORDER_FLAG = "xla_cpu_enable_concurrency_optimized_scheduler"


def _is_cpu_alone(environ: Mapping[str, str]) -> bool:
    """Whether JAX can find no device other than CPUs."""
    return environ.get("JAX_PLATFORMS") == "cpu" or importlib.util.find_spec("jax_plugins") is None


def keep_freed_memory(environ: Mapping[str, str]) -> None:
    """On CPUs, let the C library keep what is freed; to be called before anything makes threads.

    A thread may have got a heap of its own before, and large arrays in such a heap are given back all the same.
    Every program allocates its results and temporary arrays afresh, and the system would take each back once it is
    freed and clear it when it is allocated. Nothing happens where JAX may find another device, whose arrays are not in
    this memory, or where the C library is not glibc.
    """
    library = ctypes.CDLL(None) if _is_cpu_alone(environ) and sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        for option, value in _MALLOC_OPTIONS.items():
            library.mallopt(option, value)


# Of malloc.h: M_ARENA_MAX (threads share one heap), M_MMAP_MAX (no allocation outside it) and M_TRIM_THRESHOLD (-1: it
# never shrinks).
_MALLOC_OPTIONS = {-8: 1, -4: 0, -1: -1}


def run_train(args: argparse.Namespace) -> None:
    from rlhf_jax.config import load_config
    from rlhf_jax.mesh import make_mesh
    from rlhf_jax.recipe import Recipe
    from rlhf_jax.stages.stopping import stop_on_signals
    from rlhf_jax.train import train

    recipe = load_config(args.config, args.overrides, Recipe)
    with stop_on_signals():
        train(recipe, make_mesh(recipe.mesh), () if args.command == "train" else (args.command,))
    LOGGER.info(f"{args.command}: all output is in {recipe.run.dir}")
    if policy := latest_export("policy", recipe.run):
        LOGGER.info(f"talk to the result: rlhf-jax chat {policy}")


def run_evaluate(args: argparse.Namespace) -> None:
    if args.prompts is not None:
        run_compare(args)
        return
    if args.reward or args.output or Path(args.config).is_dir():
        raise ValueError("folders, --reward and --output need --prompts FILE; without it the argument is a TOML file")
    from rlhf_jax import hosts
    from rlhf_jax.config import dump_config, load_config
    from rlhf_jax.evaluate import evaluate
    from rlhf_jax.mesh import make_mesh
    from rlhf_jax.recipe import Recipe
    from rlhf_jax.stages.run_folder import check_same_data
    from rlhf_jax.train import try_report

    recipe = load_config(args.config, args.overrides, Recipe).with_date()
    check_same_data(recipe.run, dump_config(recipe))
    report = evaluate(recipe.run, make_mesh(recipe.mesh), recipe.data, recipe.evaluate, recipe.model)
    if hosts.is_main():
        try_report(recipe.run)
        print(report, flush=True)


def run_compare(args: argparse.Namespace) -> None:
    from rlhf_jax.compare import compare_models
    from rlhf_jax.config import parse_config
    from rlhf_jax.evaluate import EvaluateConfig

    named = [args.config, *args.overrides]
    settings = "\n".join(each for each in named if "=" in each)
    config = parse_config(EvaluateConfig, tomllib.loads(settings), "key=value")
    folders = [each for each in named if "=" not in each]
    chosen = dict(dtype=args.dtype, output=args.output)
    print(compare_models(folders, args.prompts, args.reward, config, **chosen).report, flush=True)


def run_score(args: argparse.Namespace) -> None:
    from rlhf_jax.compare import score_file

    output = open(args.output, "w", encoding="utf-8") if args.output else nullcontext(sys.stdout)
    with output as out:
        score_file(args.folder, args.file, adapter=args.adapter, dtype=args.dtype, out=out)


def run_plan(args: argparse.Namespace) -> int:
    from rlhf_jax.config import load_config
    from rlhf_jax.plan import hardware_of_config, local_gpus, make_plan
    from rlhf_jax.plan.report import format_plan
    from rlhf_jax.recipe import Recipe

    recipe = load_config(args.config, args.overrides, Recipe)
    if args.price_per_gpu_hour < 0:
        raise ValueError(f"--price-per-gpu-hour {args.price_per_gpu_hour:g}: at least 0")
    plan = make_plan(recipe, args.gpus or local_gpus(hardware_of_config(args.config)), args.price_per_gpu_hour)
    print(json.dumps(plan) if args.json else format_plan(plan), flush=True)
    return PLAN_EXITS[plan["fits"]]


def run_data(args: argparse.Namespace) -> None:
    from rlhf_jax.config import load_config
    from rlhf_jax.recipe import Recipe
    from rlhf_jax.show_data import show_data

    if args.examples < 0:
        raise ValueError(f"--examples {args.examples}: at least 0")
    show_data(load_config(args.config, args.overrides, Recipe).with_date(), args.examples)


def run_chat(args: argparse.Namespace) -> None:
    from rlhf_jax.chat import chat
    from rlhf_jax.sampling import SampleConfig

    sample = SampleConfig(max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p)
    chat(args.folder, sample, args.seed, args.dtype, args.adapter, args.versus)


def run_report(args: argparse.Namespace) -> None:
    from rlhf_jax.report import write_report

    LOGGER.info(f"report: {write_report(args.runs, args.output)}")


def run_rollouts(args: argparse.Namespace) -> None:
    from rlhf_jax.report.rollouts import Filters, parse_steps
    from rlhf_jax.report.show_rollouts import show_rollouts

    chosen = dict(stage=args.stage, search=args.search, finish=args.finish, sort=args.sort, limit=args.limit)
    show_rollouts(Path(args.run_folder), Filters(steps=parse_steps(args.step), **chosen), as_json=args.json)


def run_serve(args: argparse.Namespace) -> None:
    try:
        from rlhf_jax.serve import Limits, serve
    except ModuleNotFoundError as error:
        raise ValueError(f'serve needs {error.name}: pip install "rlhf_jax[serve]"') from error

    limits = Limits(args.rows, args.context, args.queue, args.inputs, args.body, args.seconds)
    where = dict(host=args.host, port=args.port, key=args.api_key)
    serve(args.folders, limits, **where, dtype=args.dtype, votes=args.votes)


def run_import(args: argparse.Namespace) -> None:
    from rlhf_jax.import_export import import_model

    import_model(args.source, args.destination, adapter=args.adapter, dtype=args.dtype, container=args.container)


def run_export(args: argparse.Namespace) -> None:
    from rlhf_jax.import_export import export_run

    chosen = dict(stage=args.stage, adapter=args.adapter, dtype=args.dtype, container=args.container)
    export_run(args.source, args.destination, **chosen)
