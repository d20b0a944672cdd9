"""How far do annotators agree, who disagrees with the rest, and does the answer shown first win?

    rayward run measure_agreement --source store/pandalm/rollouts --output store/pandalm/agreement.json

Prints votes, percent agreement, Fleiss' kappa, Krippendorff's alpha, Cohen's kappa of annotators two by two, every annotator's
agreement with the rest, and position bias; OUTPUT holds all of it as JSON. Nothing in the rollouts is changed: to leave out what too
few agree on, give `label_pairs` a least agreement.
"""

from dataclasses import dataclass

from rayward import agreement
from rayward.agreement import AgreementSettings, Report
from rayward.config import command
from rayward.errors import DataError
from rayward.places import at, telling, write
from rayward.storage import open_dataset


@dataclass(frozen=True)
class Settings:
    """What measure_agreement needs to know."""

    source: str  # folder of rollouts whose judgements name their annotators
    output: str = ""  # a .json file for the whole report; what it holds is replaced
    agreement: AgreementSettings = AgreementSettings()


def main(settings: Settings) -> Report:
    """Read the votes, measure, print a screen, write the rest."""
    votes = agreement.read_votes(open_dataset(settings.source, "rollouts"))
    report = agreement.measure(votes, settings.agreement)
    print(agreement.as_text(report))
    if settings.output:
        try:
            with telling(settings.output):
                write(at(settings.output), report.to_json())
        except OSError as error:
            raise DataError(f"--output {settings.output} cannot be written: {error.strerror}", "name a file, e.g. agreement.json") from None
        print(f"report: {settings.output}")
    return report


if __name__ == "__main__":
    command(main)
