"""Values of the slots in `api_table.py`, and how people say them."""

import random
from collections.abc import Callable
from typing import Any

Value = Any  # of a call: text, number, bool, list of texts, or None
Said = tuple[Value, str]  # a value, and how people say it

_PEOPLE = (
    "Alice Ben Carla Diego Emma Farid Grace Hugo Ines Jonas Kira Leo Maya Noah Olga Pedro Quinn Rosa "
    "Sami Tara Uma Victor Wendy Xavier Yara Zane"
).split()
_CITIES = (
    "Athens Berlin Cairo Dublin Florence Geneva Hanoi Istanbul Jakarta Kyoto Lisbon Madrid Nairobi "
    "Oslo Paris Quito Rome Seoul Tokyo Utrecht Vienna Warsaw Zagreb"
).split()
_DAYS = "today tomorrow Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_THINGS = "milk,eggs,bread,rice,apples,coffee,tea,soap,pasta,cheese,onions,candles".split(",")
_NEWS = (
    "I will be late,dinner is ready,the meeting was moved,I got home safely,the parcel has arrived,"
    "we should talk,the tickets are booked,I found your keys,the car is fixed,I need your help,"
    "the report is finished,lunch is on me,the door is locked,my train is delayed"
).split(",")
_ADDED = ("", " and I miss you", " so please call", " at last", " if that is fine", " once again")
_TOPICS = (
    "the gym,the dentist,grandma,the tax form,choir,the garden,homework,the vet,rent,swimming,"
    "the science fair,yoga,the car wash,the school play,football practice,the bank"
).split(",")
_MUSIC = "jazz,rock,folk,techno,piano music,film music,blues,reggae,opera,country music".split(",")
_LANGUAGES = "French German Spanish Italian Polish Turkish Korean Hindi Greek Swedish".split()
_DEVICES = (
    "the lamp,the heater,the fan,the television,the printer,the coffee machine,the radio,"
    "the air conditioner,the garage light,the humidifier"
).split(",")
_FOODS = "pizza,sushi,tacos,noodle soup,salad,curry,burgers,dumplings,falafel,risotto".split(",")
_KINDS = "pharmacies,cafes,bookshops,parking garages,museums,petrol stations,hotels".split(",")
_STOCKS = "steel copper cotton cocoa wheat silver nickel sugar lithium rubber".split()
_STYLES = "sms email poem formal friendly".split()
_SPORTS = "running,cycling,rowing,hiking,boxing,skating,climbing,tennis".split(",")


def _one_of(values: list[str]) -> Callable[[random.Random], Said]:
    def draw(rng: random.Random) -> Said:
        value = rng.choice(values)
        return value, value

    return draw


def _time(rng: random.Random) -> Said:
    hour, minute = rng.randrange(24), rng.randrange(0, 60, 5)
    half = "am" if hour < 12 else "pm"
    clock = f"{hour % 12 or 12}:{minute:02}" if minute else f"{hour % 12 or 12}"
    return f"{hour:02}:{minute:02}", f"{clock} {half}"


def _minutes(rng: random.Random) -> Said:
    if rng.random() < 0.3:
        hours = rng.randint(1, 6)
        return 60 * hours, "an hour" if hours == 1 else f"{hours} hours"
    minutes = rng.randint(2, 55)
    return minutes, f"{minutes} minutes"


def _message(rng: random.Random) -> Said:
    text = rng.choice(_NEWS) + rng.choice(_ADDED)
    return text, f'"{text}"'


def _switch(rng: random.Random) -> Said:
    on = rng.random() < 0.5
    return on, "on" if on else "off"


def _list(rng: random.Random) -> Said:
    things = rng.sample(_THINGS, rng.randint(1, 4))
    return things, " and ".join(filter(None, (", ".join(things[:-1]), things[-1])))


def _style(rng: random.Random) -> Said:
    style = rng.choice(_STYLES)
    return [style], {"sms": "SMS", "email": "an email"}.get(style, style)


def _number(low: int, high: int, unit: str = "") -> Callable[[random.Random], Said]:
    def draw(rng: random.Random) -> Said:
        number = rng.randint(low, high)
        return number, f"{number}{unit}"

    return draw


# Types of slots: as a signature writes them, and what draws a value.
TYPES: dict[str, tuple[str, Callable[[random.Random], Said]]] = {
    "person": ("text", _one_of(_PEOPLE)),
    "city": ("text", _one_of(_CITIES)),
    "day": ("text", _one_of(_DAYS)),
    "time": ("HH:MM", _time),
    "minutes": ("number", _minutes),
    "message": ("text", _message),
    "topic": ("text", _one_of(_TOPICS)),
    "music": ("text", _one_of(_MUSIC)),
    "language": ("text", _one_of(_LANGUAGES)),
    "device": ("text", _one_of(_DEVICES)),
    "switch": ("bool", _switch),
    "food": ("text", _one_of(_FOODS)),
    "kind": ("text", _one_of(_KINDS)),
    "stock": ("text", _one_of(_STOCKS)),
    "sport": ("text", _one_of(_SPORTS)),
    "items": ("list", _list),
    "style": ("list", _style),
    "percent": ("number", _number(0, 100, " percent")),
    "degrees": ("number", _number(10, 30, " degrees")),
    "people": ("number", _number(2, 12, " people")),
    "amount": ("number", _number(5, 900, " dollars")),
    "count": ("number", _number(2, 40)),
}
