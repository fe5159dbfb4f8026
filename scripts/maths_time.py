"""Families of problems about speed, clocks, calendars and change over time."""

from maths_words import DAYS, Draw, Problem, a, count, family, solved


def clock(minutes: int) -> str:
    """Write minutes after midnight as a time of the day.

    >>> clock(0), clock(754), clock(725)
    ('12:00 AM', '12:34 PM', '12:05 PM')
    """
    hour, minute = divmod(minutes % 1440, 60)
    return f"{(hour + 11) % 12 + 1}:{minute:02d} {'PM' if hour >= 12 else 'AM'}"


@family
def distance_of_trip(d: Draw) -> Problem:
    p = d.person()
    here, there = d.cities()
    v, w, h, k = d.number(20, 90, 5), d.number(20, 90, 5), d.number(2, 6), d.number(2, 6)
    unit = d.pick("kilometres", "miles")
    question = d.pick(
        f"{p} drives from {here} for {h} hours at {v} {unit} per hour and then for {k} hours at "
        f"{w} {unit} "
        f"per hour until {p.he} reaches {there}. How long is the trip?",
        f"On the way to {there}, {p} travels {h} hours at a speed of {v} {unit} an hour and {k} "
        "more hours at "
        f"{w} {unit} an hour. How many {unit} is that {d.total()}?",
    )
    steps = (
        f"The first part is {h} * {v} = {h * v} {unit} long.",
        f"The second part is {k} * {w} = {k * w} {unit} long.",
        f"The whole trip is {h * v} + {k * w} = {h * v + k * w} {unit}.",
    )
    return solved(question, steps, h * v + k * w, "{} " + unit, v=v, w=w, h=h, k=k)


@family
def time_of_trip(d: Draw) -> Problem:
    p = d.person()
    here, there = d.cities()
    v, h, rest = d.number(10, 80, 5), d.number(2, 9), d.number(1, 3)
    by = d.pick("bus", "car", "train", "truck", "van")
    pause = count(rest, "hour")
    question = d.pick(
        f"{there} is {h * v} kilometres from {here}. {p} goes there by {by} at {v} kilometres per "
        "hour "
        f"and rests {pause} on the way. How many hours after the start does {p.he} arrive?",
        f"A {by} covers the {h * v} kilometres between {here} and {there} at {v} kilometres per "
        "hour, with "
        f"a stop of {pause}. How many hours does the trip take?",
    )
    steps = (
        f"Without the stop it takes {h * v} / {v} = {h} hours.",
        f"With the stop it takes {h} + {rest} = {h + rest} hours.",
    )
    return solved(question, steps, h + rest, "{} hours", distance=h * v, v=v, rest=rest)


@family
def towards_each_other(d: Draw) -> Problem:
    p, q = d.people(2)
    here, there = d.cities()
    v, w, h = d.number(3, 60), d.number(3, 60), d.number(2, 8)
    apart = (v + w) * h
    question = d.pick(
        f"{here} and {there} are {apart} miles apart. {p} leaves {here} at {v} miles per hour and "
        f"{q} leaves "
        f"{there} at {w} miles per hour, towards each other. After how many hours do they meet?",
        f"{p} and {q} start {apart} miles apart and move towards each other, one at {v} and the "
        f"other at {w} "
        "miles per hour. How many hours pass before they meet?",
    )
    steps = (
        f"Each hour the distance shrinks by {v} + {w} = {v + w} miles.",
        f"They meet after {apart} / {v + w} = {h} hours.",
    )
    return solved(question, steps, h, "{} hours", v=v, w=w, apart=apart)


@family
def catching_up(d: Draw) -> Problem:
    p, q = d.people(2)
    slow, gap, h = d.number(3, 30), d.number(2, 12), d.number(2, 9)
    lead = gap * h
    verb = d.pick("cycles", "runs", "rides", "drives")
    question = (
        f"{p} is {lead} kilometres ahead of {q}. {p} {verb} at {slow} kilometres per hour and {q} "
        f"{verb} after "
        f"{p.him} at {slow + gap} kilometres per hour. "
        + d.pick(
            f"In how many hours does {q} catch up?", f"How many hours does {q} need to reach {p}?"
        )
    )
    steps = (
        f"Each hour {q} gains {slow + gap} - {slow} = {gap} kilometres.",
        f"To gain {lead} kilometres {q} needs {lead} / {gap} = {h} hours.",
    )
    return solved(question, steps, h, "{} hours", lead=lead, slow=slow, fast=slow + gap)


@family
def end_of_event(d: Draw) -> Problem:
    p = d.person()
    start, long_, pause = d.number(360, 1080, 5), d.number(35, 150, 5), d.number(10, 45, 5)
    what = d.pick("film", "lesson", "concert", "match", "meeting", "play", "train ride")
    hours, minutes = divmod(start, 60)
    question = d.pick(
        f"A {what} starts at {clock(start)}. It lasts {long_} minutes and there is a break of "
        f"{pause} minutes. "
        "When does it end?",
        f"{p} looks at the clock: the {what} begins at {clock(start)}, takes {long_} minutes and "
        "has a pause of "
        f"{pause} minutes. At what time is it over?",
    )
    whole = long_ + pause
    end = minutes + whole
    steps = (
        f"With the break it takes {long_} + {pause} = {whole} minutes.",
        f"Counted from {clock(hours * 60)}, it ends after {minutes} + {whole} = {end} minutes.",
        f"That is {count(end // 60, 'hour')} and {count(end % 60, 'minute')} later, at "
        f"{clock(start + whole)}.",
    )
    text = clock(start + whole)
    return solved(question, steps, start + whole, text, start=start, long=long_, pause=pause)


@family
def minutes_each_day(d: Draw) -> Problem:
    p = d.person()
    day, days = d.number(15, 90, 5), d.number(4, 14)
    act = d.pick(
        "practises the violin", "swims", "walks the dog", "studies Spanish", "reads", "draws"
    )
    question = d.pick(
        f"{p} {act} {day} minutes every day. How many hours and minutes is that in {days} days?",
        f"Every day {p} {act} for {day} minutes. How long is that after {days} days, in hours and "
        "minutes?",
    )
    whole = day * days
    hours, rest = divmod(whole, 60)
    steps = (
        f"{days} * {day} = {whole} minutes.",
        f"The full hours make {hours} * 60 = {hours * 60} minutes, and {whole} - {hours * 60} = "
        f"{rest} minutes remain.",
    )
    return solved(
        question,
        steps,
        whole,
        f"{count(hours, 'hour')} and {count(rest, 'minute')}",
        day=day,
        days=days,
    )


@family
def temperature(d: Draw) -> Problem:
    town, _ = d.cities()
    start, fall, hours, rise = d.number(-5, 25), d.number(2, 4), d.number(2, 8), d.number(2, 15)
    question = d.pick(
        f"In {town} it was {start} degrees at noon. It fell by {fall} degrees an hour for {hours} "
        "hours, and the "
        f"next morning it rose by {rise} degrees. What was the temperature then?",
        f"A thermometer in {town} shows {start} degrees. For {hours} hours it drops {fall} degrees "
        "each hour. "
        f"Then it climbs {rise} degrees. What does it show?",
    )
    down = fall * hours
    steps = (
        f"The fall is {hours} * {fall} = {down} degrees.",
        f"{start} - {down} = {start - down} degrees.",
        f"{start - down} + {rise} = {start - down + rise} degrees.",
    )
    return solved(
        question,
        steps,
        start - down + rise,
        "{} degrees",
        start=start,
        fall=fall,
        hours=hours,
        rise=rise,
    )


@family
def fuel(d: Draw) -> Problem:
    p = d.person()
    per, litres, price = d.number(8, 20), d.number(10, 50), d.number(1, 4)
    vehicle = d.pick("car", "van", "motorbike", "minibus")
    question = d.pick(
        f"{p}'s {vehicle} goes {per} kilometres on a litre of fuel. A litre costs ${price}. "
        f"What does the fuel for {per * litres} kilometres cost?",
        f"With one litre {a(vehicle)} travels {per} kilometres. How much does {p} pay for a trip "
        "of "
        f"{per * litres} kilometres if fuel is ${price} a litre?",
    )
    steps = (
        f"The trip takes {per * litres} / {per} = {litres} litres.",
        f"They cost {litres} * ${price} = ${litres * price}.",
    )
    return solved(
        question, steps, litres * price, "${}", per=per, distance=per * litres, price=price
    )


@family
def day_of_the_week(d: Draw) -> Problem:
    p, today, later = d.person(), d.number(0, 6), d.number(8, 120)
    what = d.pick("birthday", "exam", "holiday", "concert", "journey", "race")
    question = d.pick(
        f"Today is {DAYS[today]}. {p}'s {what} is in {later} days. On which day of the week is it?",
        f"If today is {DAYS[today]}, which day of the week will it be in {later} days?",
    )
    weeks, rest = divmod(later, 7)
    day = DAYS[(today + rest) % 7]
    steps = (
        f"{weeks} weeks are {weeks} * 7 = {weeks * 7} days.",
        f"Then {later} - {weeks * 7} = {count(rest, 'day')} remain after {DAYS[today]}.",
    )
    return solved(question, steps, (today + rest) % 7, day, today=today, later=later)
