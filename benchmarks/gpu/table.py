"""The report of a run on a GPU as a table."""

from __future__ import annotations

from benchmarks.gpu.run import Record, Report
from rich.console import Console
from rich.table import Table


def print_report(report: Report) -> None:
    """One row for each measurement, then the failures and the parts that were not reached."""
    console = Console()
    width = None if console.is_terminal else 160  # a file has no width of its own
    console = Console(width=width)
    environment = report.environment
    console.print(
        f"{environment.get('device')}, driver {environment.get('driver')}, CUDA {environment.get('cuda')}, "
        f"torch {environment.get('torch')}, triton {environment.get('triton')}, python {environment.get('python')}, "
        f"commit {environment.get('commit')}",
        highlight=False,
    )
    if environment.get("dry"):
        console.print("A dry run: its times are of the interpreter and of the CPU, and mean nothing.")
    console.print(_table(report))
    tests = report.tests
    console.print(f"tests: {tests.get('passed', 0)} passed, {len(tests.get('failed', []))} failed", highlight=False)
    for tool, found in report.sanitizer.items():
        console.print(f"tests under {tool}: {found['passed']} passed, {len(found['failed'])} failed", highlight=False)
    if report.not_installed:
        console.print(f"not installed: {', '.join(report.not_installed)}", highlight=False)
    if report.launches_per_layer is not None:
        console.print(f"kernels of a decoding step: {report.launches_per_layer:.1f} a layer", highlight=False)
    for failure in report.failures:
        console.print(f"FAILED {_name(failure)}: {failure['error']}", markup=False, highlight=False)
    for missing in report.not_reached:
        console.print(f"not reached: {_name(missing)}", markup=False, highlight=False)
    console.print(f"{len(report.failures)} failures, {report.seconds:.0f} s", highlight=False)


def _table(report: Report) -> Table:
    table = Table(title=f"predicted for: {report.predicted_for or 'no machine of this name'}", title_justify="left")
    table.add_column("")
    table.add_column("")
    for title in ("us", "GB/s", "TFLOP/s", "% of roof", "predicted us", "measured/predicted", "tokens/s"):
        table.add_column(title, justify="right")
    section = None
    for each in report.measurements:
        if each["section"] != section:
            section = each["section"]
            table.add_section()
        table.add_row(f"{section} {each['op']}", each["case"], *_cells(each))
    return table


def _cells(each: Record) -> list[str]:
    return [
        f"{each['seconds'] * 1e6:,.1f}",
        f"{each['bytes_per_second'] / 1e9:,.0f}",
        f"{each['operations_per_second'] / 1e12:,.1f}" if each["operations"] else "",
        f"{100 * each['fraction']:.0f}",
        f"{each['predicted_seconds'] * 1e6:,.1f}" if "predicted_seconds" in each else "",
        f"{each['measured_over_predicted']:.2f}" if "measured_over_predicted" in each else "",
        f"{each['tokens_per_second']:,.1f}" if "tokens_per_second" in each else "",
    ]


def _name(place: Record) -> str:
    return " ".join(part for part in (place["section"], place["op"], place["case"]) if part)
