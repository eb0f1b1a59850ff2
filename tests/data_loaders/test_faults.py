import pickle

from data_loaders.faults import SHOWN, Fault, Refusal


def test_a_fault_says_where_what_and_how_to_repair_it():
    assert str(Fault("a.csv:3", "no label", "fill the cell")) == "a.csv:3: no label — fill the cell"
    assert str(Fault("a.csv:3", "no label")) == "a.csv:3: no label"


def test_a_refusal_shows_the_first_faults_and_counts_the_others():
    faults = [Fault(f"a.csv:{i}", "bad") for i in range(SHOWN + 1_500)]
    lines = str(Refusal("Nothing was written:", faults)).splitlines()
    assert lines[0] == "Nothing was written:"
    assert lines[1] == "  a.csv:0: bad"
    assert len(lines) == SHOWN + 2
    assert lines[-1] == "  … and 1,500 more"
    assert "more" not in str(Refusal("Nothing was written:", faults[:SHOWN]))


def test_a_refusal_comes_whole_out_of_another_process():
    sent = Refusal("No:", [Fault("a", "b", "c")], 65)
    received = pickle.loads(pickle.dumps(sent))  # noqa: S301 - our own bytes, as a pool of processes passes them on
    assert (received.title, received.faults, received.exit_code) == (sent.title, sent.faults, 65)
    assert str(received) == str(sent)
