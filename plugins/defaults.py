"""What a run does where no other plugin does it: loading, running a case, timing, header and summary."""

from spath_eval import hookimpl


@hookimpl(trylast=True)
def spath_load_model(request):
    from spath_eval.models import load

    return load(request)


@hookimpl(trylast=True)
def spath_run_case(case, session):
    from spath_eval.session import run_case

    return run_case(case, session)


@hookimpl(trylast=True)
def spath_measure_speed(session):
    from spath_eval.speed.measurement import measure_case

    return measure_case(session)


@hookimpl(tryfirst=True)
def spath_update_record(record):
    from spath_eval.records import environment

    record["environment"] |= environment(record["environment"]["device"], record["environment"]["dtype"])


@hookimpl(tryfirst=True)
def spath_report_header(session):
    from importlib.metadata import version

    packages = ", ".join(f"{name} {version(name)}" for name in ("spath-eval", "torch", "transformers", "lm-eval"))
    others = [p for p in session.registry.plugins if p.status == "active" and p.distribution != "spath-eval"]
    names = ", ".join(f"{plugin.name} ({plugin.distribution} {plugin.version})" for plugin in others) or "built-in only"
    return [packages, f"device: {session.device}, {session.dtype}", f"plugins: {names}"]


@hookimpl(trylast=True)
def spath_terminal_summary(session, write):
    bad = [case for case in session.results if case["outcome"] in ("failed", "error")]
    for case in bad:
        write(f"{case['outcome'].upper()} {case['id']}: {case['message']}")
    passed = sum(case["outcome"] == "passed" for case in session.results)
    counts = [f"{passed} passed"] + [
        f"{count} {outcome}" for outcome in ("failed", "error") if (count := sum(c["outcome"] == outcome for c in bad))
    ]
    if left := len(session.cases) - len(session.results):
        counts.append(f"{left} not run")
    write(", ".join(counts))
