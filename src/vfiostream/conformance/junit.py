"""A report as JUnit XML, which continuous integration reads: a test suite of one test case for each rule."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

from vfiostream.conformance.rules import Outcome, Verdict
from vfiostream.conformance.run import Report

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(report: Report) -> bytes:
    """The document, in UTF-8."""
    count = str(len(report.outcomes))
    failures = str(len(report.broken))
    skipped = str(sum(one.verdict in (Verdict.NOT_TESTABLE, Verdict.SKIPPED) for one in report.outcomes))
    seconds = f"{sum(one.seconds for one in report.outcomes):.3f}"
    totals = {"tests": count, "failures": failures, "errors": "0", "skipped": skipped, "time": seconds}
    root = ElementTree.Element("testsuites", {"name": "vfiostream conformance", **totals})
    suite = ElementTree.SubElement(root, "testsuite", {"name": report.interface, **totals})
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in (("device", report.device), ("target", report.target)):
        if value is not None:
            ElementTree.SubElement(properties, "property", {"name": name, "value": _clean(value)})
    for outcome in report.outcomes:
        _case(suite, report.interface, outcome)
    ElementTree.indent(root)
    document: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _case(suite: ElementTree.Element, interface: str, outcome: Outcome) -> None:
    rule, detail = outcome.rule, _clean(outcome.detail)
    attributes = {"classname": f"conformance.{interface}", "name": rule.id, "time": f"{outcome.seconds:.3f}"}
    case = ElementTree.SubElement(suite, "testcase", attributes)
    match outcome.verdict:
        case Verdict.BROKEN:
            failure = ElementTree.SubElement(case, "failure", {"type": "broken", "message": detail})
            failure.text = f"{rule.sentence}\nSource: {rule.source}"
        case Verdict.NOT_TESTABLE | Verdict.SKIPPED:
            ElementTree.SubElement(case, "skipped", {"message": f"{outcome.verdict}: {detail}"})
        case Verdict.KEPT if detail:
            ElementTree.SubElement(case, "system-out").text = detail


def _clean(text: str) -> str:
    """``text`` without what XML can't hold: part of it may come from a driver."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
