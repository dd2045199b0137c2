"""The command line: each command parses, makes one library call and renders what comes back.

Results go to stdout (``--json`` for machines), everything else to stderr. Exit codes: 0 good, 1 an error with
its one sentence, 2 wrong usage, 3 backends that disagree, 130 interrupted. Library modules are imported
inside the commands, so that ``edgemat --help`` answers at once.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

import edgemat
from edgemat.errors import EdgematError, ParityError

if TYPE_CHECKING:
    import numpy as np

    from edgemat.lower.graph import Graph

    Arrays = np.ndarray | dict[str, np.ndarray]
    Formats = tuple[tuple[str, str], ...]

EXIT_ERROR = 1
EXIT_MISMATCH = 3
EXIT_INTERRUPTED = 130
BACKENDS = ("reference", "onnx", "hls", "hls:parallel", "hls:stream", "mcu", "mcu:cortex-m4", "mcu:rv32imc")


class ArrayFile(click.ParamType):
    """A ``.npy`` file (one array) or an ``.npz`` file (a dict of arrays by input name)."""

    name = "array file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Load the file; refuse what is not an array file as wrong usage."""
        import zipfile

        import numpy as np

        try:
            with open(value, "rb") as file:
                loaded = np.load(file, allow_pickle=False)
                return dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else loaded
        except OSError as error:
            self.fail(f"{value}: {error.strerror or 'cannot be read'}.", param, ctx)
        except (ValueError, EOFError, zipfile.BadZipFile):
            self.fail(f"{value} is not a .npy or .npz file of plain arrays; write one with numpy.save.", param, ctx)


class BackendList(click.ParamType):
    """Backend names separated by commas."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Split the list and refuse names that are no backend."""
        names = tuple(part.strip() for part in value.split(",") if part.strip())
        unknown = [name for name in names if name not in BACKENDS]
        if unknown or not names:
            found = f"{unknown[0]!r} is no backend" if unknown else "the list is empty"
            self.fail(f"{found}; choose from {', '.join(BACKENDS)}.", param, ctx)
        return names


class InputFormat(click.ParamType):
    """``NAME=FORMAT``: the number format of a float input."""

    name = "name=format"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Split at the last equals sign: names may hold others."""
        name, _, text = value.rpartition("=")
        if not name or not text:
            self.fail(f"{value!r} is no NAME=FORMAT, such as x=ufixed<8,0>.", param, ctx)
        return name, text


MODEL = click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
CODES = click.option("--codes", is_flag=True, help="Arrays hold integer codes, not real values.")
INPUT = click.option(
    "--input",
    "formats",
    type=InputFormat(),
    multiple=True,
    help="Foreign file: format of a float input that no quantiser states.",
)
STRICT = click.option("--strict", is_flag=True, help="Foreign file: refuse nodes that are not exact.")
TARGET = click.Choice(["hls", "mcu"])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(edgemat.__version__, prog_name="edgemat", message="%(prog)s %(version)s")
def cli() -> None:
    """One trained network, the same bits on FPGA and microcontroller."""


@cli.command(name="import")
@MODEL
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Lowered file.")
@INPUT
@STRICT
@click.option("--report", "as_table", is_flag=True, help="Show each node: taken, folded or refused, and why.")
@JSON
def import_(model: Path, output: Path, formats: Formats, strict: bool, as_table: bool, as_json: bool) -> None:
    """Bring a foreign ONNX file into the lowered form.

    MODEL is a quantised network of another tool: QONNX, QDQ or QOperator. Either every node is taken with exact
    integers, or all refusals are shown at once, with --report beside what became of the other nodes.
    """
    from edgemat.foreign.importing import ImportRefused

    if output.exists() and output.samefile(model):
        raise EdgematError(
            f"the lowered file would replace {output}, which it is made from; name another file after -o"
        )
    try:
        made = edgemat.import_onnx(model, output, inputs=dict(formats), strict=strict)
    except ImportRefused as error:
        if as_table or as_json:
            _show(error.report, as_json)
        raise
    if as_table or as_json:
        _show(made, as_json)
    else:
        click.echo(made.summary())
        click.echo(output)


@cli.command()
@MODEL
@click.option(
    "--target",
    type=click.Choice([*TARGET.choices, "qonnx"]),
    required=True,
    help="hls: an HLS C++ project. mcu: a C library. qonnx: a QONNX file.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write; for qonnx a file."
)
@click.option("--io", type=click.Choice(["parallel", "stream"]), help="hls: interface.  [default: parallel]")
@click.option("--reuse", type=click.IntRange(min=1), help="hls: multiplications that share one multiplier.")
@click.option("--plan", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="hls: plan by layer (TOML).")
@click.option("--clock-ns", type=click.FloatRange(min=0, min_open=True), help="hls: clock period.  [default: 5]")
@click.option("--part", help="hls: device to synthesise for.")
@click.option(
    "--products", type=click.Choice(["shift_add", "compiler"]), help="How K-hot weights multiply.  [default: shift_add]"
)
@click.option(
    "--ternary-packing",
    type=click.Choice(["auto", "2", "1.6"]),
    help="mcu: bits a ternary weight takes in flash.  [default: auto, the faster one]",
)
@click.option("--batch", type=click.IntRange(min=1), help="qonnx: samples of one run.  [default: 1]")
@INPUT
@STRICT
def export(model: Path, target: str, output: Path, formats: Formats, strict: bool, **options: Any) -> None:
    """Write a target's project or file for MODEL.

    MODEL is a lowered file, or a foreign one (QONNX, QDQ, QOperator), which is imported on the way.
    """
    given = {name: value for name, value in options.items() if value is not None}
    takers = {"products": ("hls", "mcu"), "ternary_packing": ("mcu",), "batch": ("qonnx",)}  # all others: hls
    for name in given:
        takes = takers.get(name, ("hls",))
        if target not in takes:
            raise click.UsageError(
                f"--{name.replace('_', '-')} belongs to --target {' and '.join(takes)}; "
                f"--target {target} does not take it."
            )
    if "reuse" in given and "plan" in given:
        raise click.UsageError("--reuse and --plan exclude each other; write the reuse factors into the plan.")
    edgemat.export(_opened(model, formats, strict), target=target, output=output, **given)
    click.echo(output)


@cli.command()
@MODEL
@click.option("--inputs", type=ArrayFile(), required=True, help=".npy; several inputs: .npz by name.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help=".npy or .npz")
@CODES
@click.option("--sequence", is_flag=True, help="The first axis of --inputs counts steps; the model keeps its states.")
@INPUT
@STRICT
def simulate(
    model: Path, inputs: Arrays, output: Path, codes: bool, sequence: bool, formats: Formats, strict: bool
) -> None:
    """Compute a model's outputs, bit-exactly.

    MODEL is a lowered file, or a foreign one, which is imported on the way; the outputs are those of the hardware, to
    the bit. A file with recurrent states is one step: with --sequence it runs once for each entry of the first axis.
    """
    if output.exists() and output.samefile(model):
        raise EdgematError(f"the outputs would replace the model {output}; name another file after -o")
    simulator = edgemat.Simulator(_opened(model, formats, strict))
    result = simulator.run_sequence(inputs, codes=codes) if sequence else simulator(inputs, codes=codes)
    _save(output, result)
    click.echo(output)


@cli.command()
@MODEL
@click.option("--inputs", type=ArrayFile(), help=".npy; several inputs: .npz by name.")
@click.option("--samples", type=click.IntRange(min=1), help="Random samples beside the corner vectors.")
@click.option("--steps", type=click.IntRange(min=1), help="Random steps of a file with recurrent states.")
@click.option("--corner-steps", type=click.IntRange(min=0), help="Steps of a corner sequence; 0: none.  [default: 32]")
@click.option("--backends", type=BackendList(), help=f"Any of {', '.join(BACKENDS)}, separated by commas.")
@CODES
@JSON
@INPUT
@STRICT
@click.option(
    "--against",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Compare with this foreign file, of which MODEL was made, on --inputs instead.",
)
def verify(
    model: Path,
    inputs: Arrays | None,
    samples: int | None,
    steps: int | None,
    corner_steps: int | None,
    backends: tuple[str, ...] | None,
    codes: bool,
    as_json: bool,
    formats: Formats,
    strict: bool,
    against: Path | None,
) -> None:
    """Compare the integers of every backend.

    MODEL is a lowered file, or a foreign one, which is imported on the way. Exit code 3 when a backend differs from the
    reference. A file with recurrent states is run on sequences: --samples of them with --steps each (default 4 and
    256), or --inputs [steps, samples, ...]. Corner sequences run beside them, no longer than they are.

    --against runs the foreign file that MODEL was made of on the same --inputs and prints equal outputs, equal largest
    classes, and the first node that differs. Exit code 3 when a largest class differs, or the integers of a QONNX node
    that the import calls exact and whose scales are powers of two.
    """
    if against is not None and (inputs is None or codes or backends or samples or steps or corner_steps is not None):
        raise click.UsageError(
            "--against compares real --inputs, and takes no --codes, --backends, --samples or steps."
        )
    if inputs is not None and (samples is not None or steps is not None):
        raise click.UsageError("--inputs excludes --samples and --steps.")
    if codes and inputs is None:
        raise click.UsageError("--codes says what --inputs holds; give --inputs.")
    if against is not None:
        assert inputs is not None
        opened = _opened(model, formats, strict)
        compared = edgemat.compare(opened, against, inputs, formats=dict(formats))
        _show(compared, as_json)
        if not compared.ok:
            sys.exit(EXIT_MISMATCH)
        return
    drawn: dict[str, Any] = {"samples": samples, "steps": steps, "corner_steps": corner_steps}
    report = edgemat.verify(_opened(model, formats, strict), inputs=inputs, backends=backends, codes=codes, **drawn)
    _show(report, as_json)
    if not report.ok:
        sys.exit(EXIT_MISMATCH)


@cli.command()
@MODEL
@click.option("--target", type=TARGET, help="Add the target's modelled cost.")
@JSON
@INPUT
@STRICT
def inspect(model: Path, target: str | None, as_json: bool, formats: Formats, strict: bool) -> None:
    """Show formats, ranges, proof and cost.

    For each node of MODEL (lowered, or foreign and imported on the way): formats, ranges, accumulator widths,
    multiplies, weight bits and, with --target, the modelled cost; and the proof that no accumulator can overflow.
    """
    from edgemat.report import inspect as describe

    _show(describe(_opened(model, formats, strict), target=target), as_json)


@cli.command()
@MODEL
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="HTML file.")
@click.option("--inputs", type=ArrayFile(), help="Samples: .npy; several inputs: .npz by name.  [default: generated]")
@CODES
@click.option("--history", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Formats over time.")
@click.option("--front", type=click.Path(exists=True, path_type=Path), help="front.json of an edgemat.Front.")
@INPUT
@STRICT
def report(
    model: Path,
    output: Path,
    inputs: Arrays | None,
    codes: bool,
    history: Path | None,
    front: Path | None,
    formats: Formats,
    strict: bool,
) -> None:
    """Show values, formats, training and cost on one HTML page.

    MODEL is a lowered file, a foreign one, which is imported on the way, or a checkpoint of a training (formats and
    weights). The page loads nothing from anywhere.
    --history takes what edgemat.FormatHistory saved or a CSV logger's metrics.csv.
    """
    from edgemat.report import write_report

    if codes and inputs is None:
        raise click.UsageError("--codes says what --inputs holds; give --inputs.")
    if output.exists() and output.samefile(model):
        raise EdgematError(f"the report would replace {output}, which it is made from; choose another output")
    opened = _opened(model, formats, strict)
    with warnings.catch_warnings(record=True) as noticed:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", RuntimeWarning)
        written = write_report(opened, output, inputs, codes, history, front)
    for warning in noticed:
        click.echo(f"edgemat: warning: {warning.message}", err=True)
    click.echo(written)


@cli.command()
@JSON
def ops(as_json: bool) -> None:
    """Show which operator runs on which backend."""
    from edgemat.report import ops_table

    _show(ops_table(), as_json)


@cli.command()
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), help="Folder for the files.")
def demo(output: Path | None) -> None:
    """Train on digits and see all backends agree."""
    from edgemat import demo as demonstration

    result = demonstration.run() if output is None else demonstration.run(output)
    if not result.ok:
        sys.exit(EXIT_MISMATCH)


@cli.command()
def headers() -> None:
    """Fetch the ap_int and ap_fixed headers.

    The C simulation of HLS projects compiles against them. Prints their folder, which is EDGEMAT_AP_INCLUDE,
    a Vitis installation's, or the user's cache (filled once from the Apache-licensed part of a PyPI wheel).
    """
    from edgemat.targets.apheaders import fetch_ap_headers

    click.echo(fetch_ap_headers())


def _opened(path: Path, formats: Formats, strict: bool) -> Path | Graph:
    """The path of a lowered file as it is, a foreign file imported; says on stderr what the import did."""
    from edgemat.foreign.opening import open_model

    opened = open_model(path, inputs=dict(formats), strict=strict)
    if opened.report is not None:
        click.echo(opened.report.summary(), err=True)
    return opened.model


def _show(report: Any, as_json: bool) -> None:
    """Print a report: its dict as JSON, or its table as wide as the terminal."""
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # tables in a log or a pipe keep their columns
        console = Console(width=max(console.width, 160))
    console.print(report.render())


def _save(path: Path, result: Arrays) -> None:
    """Write ``.npy`` or ``.npz`` beside the target name first, so that no half-written file carries it."""
    import numpy as np

    if isinstance(result, dict) and path.suffix != ".npz":
        raise click.UsageError(
            f"the model has {len(result)} outputs ({', '.join(result)}), and {path.name} can hold one; "
            "name an .npz file after -o."
        )
    if not path.parent.is_dir():
        raise click.UsageError(f"the folder {path.parent} does not exist; create it or name another file after -o.")
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            if path.suffix == ".npz":
                np.savez(file, **(result if isinstance(result, dict) else {"output": result}))  # type: ignore[arg-type]
            else:
                np.save(file, result, allow_pickle=False)  # type: ignore[arg-type]
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"edgemat: {message}", err=True)
    sys.exit(code)


def _os_error(error: OSError) -> str:
    place = f" while writing {error.filename}" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"the disk is full{place}; free some space or choose another folder with -o."
    named = f"{error.filename}: " if error.filename else ""
    return f"{named}{error.strerror or error}; check the path and the rights to it."


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code.

    Args:
        arguments: The words after the program's name; ``sys.argv`` by default.
    """
    try:
        cli.main(args=None if arguments is None else list(arguments), prog_name="edgemat", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted.", EXIT_INTERRUPTED)
    except ParityError as error:
        _fail(str(error), EXIT_MISMATCH)
    except EdgematError as error:
        _fail(str(error), EXIT_ERROR)
    except BrokenPipeError:  # the reader of stdout left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_ERROR)
    except OSError as error:
        _fail(_os_error(error), EXIT_ERROR)
    except MemoryError:
        _fail("memory ran out; pass fewer samples at once.", EXIT_ERROR)
    sys.exit(0)


if __name__ == "__main__":
    main()
