"""`electricity` of a fleet file: what a kilowatt-hour costs and emits, by the hour of the day."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from llmbuild.spec.files.strict import Strict
from llmbuild.spec.fleet import Basis
from llmbuild.spec.tariff import Series, Tariff

_Hour = Annotated[float, Field(ge=0, lt=24)]
_Carbon = Annotated[dict[_Hour, Annotated[float, Field(ge=0, le=5000)]], Field(min_length=1)]
_Price = Annotated[dict[_Hour, Annotated[float, Field(ge=-100, le=100)]], Field(min_length=1)]


class Electricity(Strict):
    """Series by hours, and the hour at which a trace begins."""

    carbon: _Carbon | None = None
    price: _Price | None = None
    begins: _Hour = 0.0
    basis: Basis
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def _whole(self) -> Electricity:
        if self.carbon is None and self.price is None:
            raise ValueError("give `carbon`, grams for a kWh, or `price` of a kWh, by the hour from which each holds")
        for name, series in (("carbon", self.carbon), ("price", self.price)):
            if series is not None and 0 not in series:
                told = f"{name} begins at hour {min(series):g}: say what holds from hour 0 on"
                raise ValueError(f"{told}, such as {{0: {series[max(series)]:g}, ...}}")
        return self

    def made(self) -> Tariff:
        """Return it as data."""
        return Tariff(_series(self.carbon), _series(self.price), self.begins * 3600, self.basis, self.source)


def _series(values: dict[float, float] | None) -> Series | None:
    if values is None:
        return None
    hours = tuple(sorted(values))
    return Series(hours, tuple(values[hour] for hour in hours))
