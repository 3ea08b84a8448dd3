"""`kvfleet energy report`: adds up what routers or a Prometheus say, whoever asks by which labels."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

import orjson
import pytest
from typer.testing import CliRunner

from kvfleet.inputs import UsageError
from kvfleet.main import app

ROWS = [
    ("p", "acme", "m", "prefill", 3600.0),
    ("p", "acme", "m", "decode", 7200.0),
    ("p", "acme", "m", "step", 3600.0),
    ("p", "=cmd()", "m", "decode", 1800.0),
    ("p", "", "", "idle", 10800.0),
]


class Answers(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        parts = urlsplit(self.path)
        if parts.path == "/metrics":
            lines = ["# TYPE kvfleet_energy_joules counter"]
            lines += [
                f'kvfleet_energy_joules_total{{pool="{p}",tenant="{t}",model="{m}",kind="{k}"}} {v}'
                for p, t, m, k, v in ROWS
            ]
            lines += [
                "# TYPE kvfleet_energy_co2_grams counter",
                'kvfleet_energy_co2_grams_total{pool="p",tenant="acme"} 1.5',
                'kvfleet_energy_saved_joules_total{pool="p"} 9000',
                'kvfleet_energy_saved_joules_total{pool="q"} 3600',
                'kvfleet_energy_lost_joules_total{pool="p"} 1800',
                'kvfleet_energy_saved_joules_stderr{pool="p"} 2700',
                'kvfleet_energy_saved_joules_stderr{pool="q"} 900',
            ]
            body = ("\n".join(lines) + "\n").encode()
        else:
            query = parse_qs(parts.query)
            self.asked.append(query["query"][0])
            result = [
                {"metric": {"pool": p, "tenant": t, "model": m, "kind": k}, "value": [0, str(v)]}
                for p, t, m, k, v in ROWS
            ]
            body = orjson.dumps({"status": "success", "data": {"resultType": "vector", "result": result}})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def url():
    Answers.asked.clear()
    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def report(*arguments):
    result = CliRunner().invoke(app, ["energy", "report", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_by_tenant_with_grams_the_most_first(url):
    lines = report(f"--url={url}", "--by=tenant", "--csv=-").splitlines()
    assert lines[0] == "tenant,prefill_joules,decode_joules,step_joules,idle_joules,total_joules,co2_grams"
    assert lines[1] == "acme,3600.000,7200.000,3600.000,0.000,14400.000,1.500"
    assert lines[3].startswith("'=cmd(),")


def test_several_routers_add_up(url):
    assert "28800.000" in report(f"--url={url}", f"--url={url}", "--by=tenant", "--csv=-")


def test_a_table_shows_shares_and_that_idling_is_nobodys(url):
    text = report(f"--url={url}")
    assert "(idle)" in text
    assert "53.3%" in text


def test_what_was_saved_against_least_request_stands_below_with_its_error(url):
    assert "Saved against least_request, by the model: 3.00 ± 1.00 Wh" in report(f"--url={url}")
    assert "by the model: 6.00 ± 2.00 Wh" in report(f"--url={url}", f"--url={url}")


def test_over_a_range_of_time_the_error_is_not_known(url):
    text = report(f"--prometheus={url}")
    assert "Saved against least_request, by the model: 0.00 Wh" in text
    asked = [query for query in Answers.asked if "saved" in query or "lost" in query]
    assert [query.partition("increase(")[2] for query in asked[-2:]] == [
        "kvfleet_energy_saved_joules_total[24h]))",
        "kvfleet_energy_lost_joules_total[24h]))",
    ]


def test_prometheus_is_asked_for_the_growth_within_the_range(url, tmp_path):
    out = tmp_path / "week.csv"
    report(f"--prometheus={url}", "--since=7d", "--by=pool", f"--csv={out}")
    assert out.read_text().splitlines()[1].startswith("p,3600.000,")
    assert Answers.asked[0] == "sum by (pool, tenant, model, kind) (increase(kvfleet_energy_joules_total[7d]))"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--by=colour"], "use some of pool, tenant, model"),
        (["--prometheus=http://127.0.0.1:9", "--since=yesterday"], "a number and a unit"),
        (["--url=http://127.0.0.1:9"], "is the address right"),
    ],
)
def test_what_cannot_be_is_said(arguments, message):
    with pytest.raises(UsageError, match=message):
        CliRunner().invoke(app, ["energy", "report", *arguments], catch_exceptions=False)
