"""The commands and their options, and how an error becomes an exit code."""

import json
import os
import shutil
import sys
import textwrap
import traceback
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from llmforge import __version__
from llmforge.errors import DownloadInterrupted, InputError, Interrupted, LlmforgeError

if TYPE_CHECKING:
    from llmforge.data.executors import Executor
    from llmforge.export.proof import Proof
    from llmforge.jobs.ray_jobs import Job
    from llmforge.jobs.run import Run

app = typer.Typer(
    name="llmforge",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Look at data as the model will see it.", no_args_is_help=True)
app.add_typer(data_app, name="data")
prompt_app = typer.Typer(help="Find out and prove how conversations become text.", no_args_is_help=True)
app.add_typer(prompt_app, name="prompt")
anyscale_app = typer.Typer(help="Run on a Ray cluster.", no_args_is_help=True)
app.add_typer(anyscale_app, name="anyscale")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file that describes the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, nested ones with dots. Repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
RunPath = Annotated[
    str, typer.Argument(metavar="RUN", help="Directory of a run or of an artifact; local, s3:// or gs://.")
]
DefaultMode = Annotated[bool, typer.Option("--default", help="Choose everything but the model and the data.")]
Resume = Annotated[
    str | None,
    typer.Option("--resume", metavar="RUN_DIR", help="Continue a run from its last checkpoint; local, s3:// or gs://."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Stop before the first step.")]
AllowUnproven = Annotated[
    bool, typer.Option("--allow-unproven", help="Write the artifact even if its proof fails; its card says so.")
]
OptionalConfig = Annotated[Path | None, typer.Argument(metavar="CONFIG", help="YAML file that describes the run.")]
Address = Annotated[
    str | None,
    typer.Option(
        "--address", help="Cluster: host:6379, or http://host:8265 for jobs. Else RAY_ADDRESS, or one running here."
    ),
]
NumDevices = Annotated[
    int | None, typer.Option("--num-devices", min=1, help="With --resume: go on with another number of devices.")
]
JobId = Annotated[str, typer.Argument(metavar="JOB_ID", help="What the job was called when it was submitted.")]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"llmforge {__version__}")
        raise typer.Exit


@app.callback()
def llmforge(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune any Hugging Face LLM from one YAML file, with any prompt format, and serve what you trained."""


@app.command()
def finetune(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    default: DefaultMode = False,
    resume: Resume = None,
    num_devices: NumDevices = None,
    dry_run: DryRun = False,
    allow_unproven: AllowUnproven = False,
    as_json: AsJson = False,
) -> None:
    """Run the fine-tuning job that CONFIG describes."""
    _check_start(config, resume, bool(overrides or default or dry_run), num_devices)
    _finetune(config, overrides, default, resume, num_devices, dry_run, allow_unproven, as_json)


def _check_start(config: Path | None, resume: str | None, changes: bool, num_devices: int | None) -> None:
    if (config is None) == (resume is None):
        raise InputError("give either CONFIG, to start a run, or --resume RUN_DIR, to continue one")
    if resume is not None and changes:
        raise InputError("a resumed run keeps its config; --resume goes without --set, --default and --dry-run")
    if resume is None and num_devices is not None:
        raise InputError("--num-devices is for --resume; for a new run use --set num_devices=N")


def _finetune(
    config: Path | None,
    overrides: list[str] | None,
    default: bool,
    resume: str | None,
    num_devices: int | None,
    dry_run: bool,
    allow_unproven: bool,
    as_json: bool,
    executor: "Executor | None" = None,
    wait: bool = False,
) -> None:
    from llmforge.config import load_config
    from llmforge.jobs import finetune as jobs
    from llmforge.jobs.display import QuietDisplay, open_display
    from llmforge.jobs.imports import imports_for_good

    # Libraries print what they please; stdout is for the one object.
    stdout = redirect_stdout(sys.stderr) if as_json else nullcontext()
    with stdout, QuietDisplay(sys.stderr) if as_json else open_display(sys.stderr) as display:
        if config is None:
            assert resume is not None
            run: Run | None = jobs.resume(
                resume,
                display,
                allow_unproven=allow_unproven,
                workers=num_devices,
                wait=wait,
                importing=imports_for_good,
                executor=executor,
            )
        else:
            loaded = load_config(config, overrides or (), default)
            run = jobs.finetune(
                loaded,
                display,
                dry_run=dry_run,
                allow_unproven=allow_unproven,
                wait=wait,
                importing=imports_for_good,
                executor=executor,
            )
    if as_json:
        result = (
            {"dry_run": True}
            if run is None
            else {
                "run_dir": str(run.run_dir),
                "artifact_dir": str(run.artifact_dir),
                "tag": run.tag,
                "metrics": run.metrics,
                **({} if run.url is None else {"url": run.url}),
            }
        )
        print(json.dumps(result))


@anyscale_app.command("finetune")
def anyscale_finetune(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    default: DefaultMode = False,
    resume: Resume = None,
    num_devices: NumDevices = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for a cluster that grows, instead of refusing.")] = False,
    dry_run: DryRun = False,
    allow_unproven: AllowUnproven = False,
    as_json: AsJson = False,
    address: Address = None,
    job: Annotated[
        bool, typer.Option("--job", help="Submit it as a Ray job, which goes on without this terminal.")
    ] = False,
    variables: Annotated[
        list[str] | None, typer.Option("--env", metavar="NAME", help="Environment variable the job gets. Repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="Files the job does not get. Repeatable.")
    ] = None,
) -> None:
    """Run the fine-tuning job that CONFIG describes on a Ray cluster."""
    _check_start(config, resume, bool(overrides or default or dry_run), num_devices)
    if not job:
        if variables or exclude:
            raise InputError("--env and --exclude are for a job; add --job")
        from llmforge.jobs.ray_cluster import connected

        with connected(address, note=_note):
            from llmforge.jobs.ray_rows import encode_on_cluster

            _finetune(
                config,
                overrides,
                default,
                resume,
                num_devices,
                dry_run,
                allow_unproven,
                as_json,
                encode_on_cluster,
                wait,
            )
        return
    from llmforge.jobs.ray_jobs import submit_finetune

    flags = [*["--dry-run"] * dry_run, *["--allow-unproven"] * allow_unproven, *["--wait"] * wait]
    flags += [] if num_devices is None else [f"--num-devices={num_devices}"]
    submitted = submit_finetune(
        config,
        overrides or (),
        default,
        resume,
        flags,
        address=address,
        exclude=exclude or (),
        variables=variables or (),
        note=lambda text: print(text, file=sys.stderr),
    )
    _follow(submitted, as_json)


@anyscale_app.command("logs")
def anyscale_logs(job_id: JobId, address: Address = None, as_json: AsJson = False) -> None:
    """Show a job's log until it ends, and end as it does."""
    from llmforge.jobs.ray_jobs import find_job

    _follow(find_job(job_id, address), as_json)


@anyscale_app.command("status")
def anyscale_status(job_id: JobId, address: Address = None, as_json: AsJson = False) -> None:
    """Say how a job stands."""
    from llmforge.jobs.ray_jobs import describe, find_job

    described = describe(find_job(job_id, address).details())
    if as_json:
        print(json.dumps(described))
        return
    for name, value in described.items():
        if value is not None:
            print(f"{name.replace('_', ' '):<10} {value}")


@anyscale_app.command("stop")
def anyscale_stop(job_id: JobId, address: Address = None) -> None:
    """Stop a job after the step it is in, with a checkpoint."""
    from llmforge.jobs.ray_jobs import find_job, stop

    job = find_job(job_id, address)
    print(f"{job.id} is being stopped; {job.command('status')}" if stop(job) else f"{job.id} has ended already")


def _follow(job: "Job", as_json: bool) -> None:
    """Show a job's log (on stderr where stdout is for JSON), say how it ended, and end the program as it did."""
    from llmforge.jobs.ray_jobs import describe, exit_code, follow

    details = follow(job, sys.stderr if as_json else sys.stdout)
    code, described = exit_code(details), describe(details)
    if as_json:
        print(json.dumps(described))
    elif code == Interrupted.exit_code:
        raise Interrupted(f"{job.id} STOPPED")
    else:
        why = f": {described['message']}" if code == 1 and described["message"] else ""
        print(f"{job.id} {described['status']}{why}", file=sys.stderr)
    raise typer.Exit(code)


@app.command()
def validate(
    config: ConfigFile,
    overrides: Overrides = None,
    default: Annotated[bool, typer.Option("--default", help="Check as `finetune --default` would.")] = False,
    config_only: Annotated[bool, typer.Option("--config-only", help="Read nothing but the YAML file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check config, data and prompt format, without loading weights."""
    from llmforge.config import load_config

    loaded = load_config(config, overrides or (), default)
    if config_only:
        from llmforge.config.capabilities import unavailable

        notes = [*loaded.notes, *(f"{key}: {text}" for key, text in unavailable(loaded))]
        _print_validation({"valid": True, "config": str(config), "notes": notes}, as_json)
        return
    from llmforge.jobs.validation import validate_run

    _print_validation({"valid": True, "config": str(config), **validate_run(loaded)}, as_json)


def _print_validation(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(report))
        return
    for note in report.pop("notes"):
        _note(note)
    print(f"{report['config']} is valid")
    for name, value in report.items():
        if name not in ("valid", "config"):
            print(f"  {name.replace('_', ' '):<16} {value:,}" if isinstance(value, int) else f"  {name:<16} {value}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the config, for editors."""
    from llmforge.config.json_schema import json_schema

    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@data_app.command("show")
def data_show(
    config: ConfigFile,
    rows: Annotated[int, typer.Option("-n", min=1, help="How many rows.")] = 3,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a row.")] = False,
) -> None:
    """Show rows token by token: what is trained, and why."""
    from llmforge.config import load_config
    from llmforge.jobs.data_view import explain_rows, print_rows

    explained = explain_rows(load_config(config, overrides or ()), rows)
    if as_json:
        for row in explained:
            print(json.dumps(row, ensure_ascii=False))
    else:
        print_rows(explained, sys.stdout)


@prompt_app.command("check")
def prompt_check(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Prove, before training, that what would be served is what would be trained."""
    from llmforge.config import load_config
    from llmforge.jobs.prove import check_prompts

    proof, notes = check_prompts(load_config(config, overrides or ()))
    _print_proof(proof, as_json, notes)


@app.command()
def prove(
    run: RunPath,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="JSONL or Parquet file of rows to prove it on. Repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Prove again that an artifact serves what was trained, and write its proof.json."""
    from llmforge.jobs.prove import prove as prove_artifact

    proven = prove_artifact(run, data=data or ())
    _print_proof(proven.proof, as_json, [])


def _print_proof(proof: "Proof", as_json: bool, notes: list[str]) -> None:
    """Print a proof sentence by sentence, or as JSON; a failed one ends the program with 1."""
    from llmforge.export.proof_words import proof_lines

    for note in notes:
        _note(note)
    if as_json:
        print(proof.to_json(None))
    else:
        print("\n".join(proof_lines(proof)))
        open_ = "" if proof.left_open is None else f", but for {proof.left_open}"
        print(f"proven{open_}" if proof.proven else "NOT proven")
    if not proof.proven:
        raise typer.Exit(1)


@app.command()
def verify_resume(
    config: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option("--steps", min=2, help="How many of the run's first steps to train.")] = 6,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the runs that are compared.")] = False,
    as_json: AsJson = False,
) -> None:
    """Prove on CONFIG that a run which is killed and resumed equals one that never stopped."""
    from llmforge.jobs.verify_resume import verify_resume as verify

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    verified = verify(config, overrides or (), steps=steps, keep=keep, say=say)
    print(json.dumps(verified.as_json()) if as_json else "\n".join(verified.lines()))
    if not verified.identical:
        raise typer.Exit(1)


@prompt_app.command("infer")
def prompt_infer(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory, .gguf file or hub id.")],
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code that the model brings.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model's chat template as a prompt_format, proven equal, or say what of it cannot be written so."""
    from llmforge.jobs.prompts import infer_prompt, inference_as_json, print_inference

    inference = infer_prompt(model, trust_remote_code=trust_remote_code)
    if as_json:
        print(json.dumps(inference_as_json(model, inference), ensure_ascii=False))
    else:
        print_inference(model, inference, sys.stdout, sys.stderr)


@app.command()
def chat(
    run: RunPath,
    system: Annotated[str | None, typer.Option(help="System message of the conversation.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 answers greedily.")] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="base", help="Show the base model's answers beside the run's.")
    ] = None,
) -> None:
    """Talk to a run's model."""
    from llmforge.jobs.talk import chat as talk

    talk(run, system=system, compare=compare, options=_given(max_new_tokens=max_new_tokens, temperature=temperature))


@app.command()
def generate(
    run: RunPath,
    input: Annotated[str, typer.Option("--input", help="JSONL file of rows with messages.")],
    output: Annotated[Path, typer.Option("--output", help="JSONL file to write: the rows, each with its answer.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Conversations answered together.")] = 8,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 answers greedily.")] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Answer with the base model, as it was before training.")
    ] = False,
    num_devices: Annotated[int, typer.Option("--num-devices", min=1, help="Answer on so many devices, with Ray.")] = 1,
) -> None:
    """Answer a file of conversations. The same command continues what was interrupted."""
    from llmforge.jobs.generate import generate as answer

    options = _given(max_new_tokens=max_new_tokens, temperature=temperature)
    count = answer(run, input, output, batch_size=batch_size, base=base, options=options, num_devices=num_devices)
    print(f"{count:,} answers in {output}", file=sys.stderr)


@app.command()
def serve(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN…]", help="Directories of runs, artifacts or models, or hub ids; NAME=PATH gives another name."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Serve what a model config of RayLLM or Ray Serve LLM says, as it says."),
    ] = None,
    engine: Annotated[str, typer.Option(help="What computes the answers: transformers or vllm.")] = "transformers",
    adapters: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME=PATH", help="Adapter on the same base model. Repeatable."),
    ] = None,
    dynamic_adapters: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Load adapters from here when they are asked for; local, s3:// or gs://."),
    ] = None,
    max_adapters: Annotated[int, typer.Option(min=1, help="How many of those are kept.")] = 16,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", envvar="LLMFORGE_API_KEY", help="Key that clients need. Repeatable."),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers generated at once.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are refused.")] = 256,
    request_timeout: Annotated[float, typer.Option(min=0.001, help="Seconds that an answer may take.")] = 600.0,
    dtype: Annotated[str | None, typer.Option(help="Number format: fp32 or bf16; by default that of the run.")] = None,
) -> None:
    """Serve models under OpenAI's API, each in the prompt format it was trained in."""
    from llmforge.jobs.serve import serve as start

    start(
        runs or (),
        config=config,
        engine=engine,
        adapters=adapters or (),
        dynamic_adapters=dynamic_adapters,
        max_adapters=max_adapters,
        host=host,
        port=port,
        api_keys=api_key or (),
        max_batch=max_batch,
        max_waiting=max_waiting,
        request_timeout=request_timeout,
        dtype=dtype,
    )


@app.command()
def export(
    run: RunPath,
    format: Annotated[
        str, typer.Option("--format", help="One of adapter, merged, ollama, gguf, vllm, rayllm: what is to serve it.")
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Directory to write; it must not hold anything yet.")],
    dtype: Annotated[str | None, typer.Option(help="Number format of merged weights: fp32, fp16 or bf16.")] = None,
    name: Annotated[str | None, typer.Option(help="What servers call the model; the run's tag by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's model for other software to serve."""
    from dataclasses import asdict

    from llmforge.jobs.export import export as write

    exported = write(run, format, to, dtype=dtype, name=name)
    if as_json:
        print(json.dumps(asdict(exported), ensure_ascii=False))
        return
    print(f"wrote {exported.directory}")
    for note in exported.notes:
        print(f"  {note}")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _print_error(error: LlmforgeError) -> None:
    """Print an error without its stack trace; on a terminal wrapped at words, with paths left whole for copying."""
    from llmforge.jobs.events import redact

    text = redact(str(error) if isinstance(error, Interrupted) else f"error: {error}")
    if sys.stderr.isatty():
        wrapper = textwrap.TextWrapper(
            shutil.get_terminal_size().columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        text = "\n".join(wrapper.fill(line) for line in text.splitlines())
    print(text, file=sys.stderr)


def main() -> NoReturn:
    """Run the console script; exit with 0 done, 1 the run failed, 2 the input is wrong, 130 interrupted."""
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
        # Left to look for itself, DeepSpeed says on stdout what it found, and other libraries import it unasked.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        app(prog_name="llmforge")
    except DownloadInterrupted as error:
        if sys.stderr.isatty():
            print("\r\x1b[J", end="", file=sys.stderr)  # over what is left of the progress bars
        _print_error(error)
        sys.stdout.flush()
        os._exit(error.exit_code)  # sys.exit would wait until the threads have downloaded their files
    except LlmforgeError as error:
        _print_error(error)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == 130:  # how typer ends on ctrl-C, without a word
            print("interrupted", file=sys.stderr)
        raise
    except Exception:  # nobody's mistake but ours: the trace says where, but not what is in HF_TOKEN
        from llmforge.jobs.events import redact

        print(redact(traceback.format_exc()), file=sys.stderr)
        sys.exit(1)
    sys.exit(0)
