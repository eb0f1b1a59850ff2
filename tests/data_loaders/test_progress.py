import io

from data_loaders.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_off_a_terminal_lines_are_rare_and_the_last_one_always_comes():
    out = io.StringIO()
    progress = Progress("ingest", 2_000, "rows", out)
    for done in range(1, 2_001):
        progress.show(done)
    lines = out.getvalue().splitlines()
    assert lines[-1].startswith("ingest: 2,000 of 2,000 rows, ")
    assert len(lines) < 100
    assert "left" not in lines[-1]
    assert "\r" not in out.getvalue()


def test_a_line_after_a_while_tells_the_rate_and_the_time_left():
    out = io.StringIO()
    progress = Progress("train", 300, "steps", out)
    progress.began -= 10
    progress.shown -= 10
    progress.show(100, "loss 0.5")
    assert out.getvalue() == "train: 100 of 300 steps, 10/s, 20 s left, loss 0.5\n"


def test_on_a_terminal_one_line_is_rewritten_until_the_work_is_done():
    out = Terminal()
    progress = Progress("draw", 2, "images", out)
    progress.shown -= 1
    progress.show(1)
    assert out.getvalue().startswith("\r")
    assert "\n" not in out.getvalue()
    progress.show(2)
    assert out.getvalue().count("\r") == 2
    assert out.getvalue().endswith("\n")


def test_no_work_at_all_is_done_at_once():
    out = io.StringIO()
    Progress("ingest", 0, "rows", out).show(0)
    assert out.getvalue().startswith("ingest: 0 of 0 rows")
