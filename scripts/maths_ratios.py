"""Families of problems about fractions, percentages, ratios, ages, averages and mixtures."""

from maths_words import Draw, Problem, family, money, solved

PARTS = {2: "half", 3: "third", 4: "quarter", 5: "fifth", 6: "sixth", 8: "eighth", 10: "tenth"}


@family
def fraction_used(d: Draw) -> Problem:
    p, t = d.person(), d.thing()
    below = d.of((3, 4, 5, 6, 8, 10))
    above, each = d.number(1, below - 1), d.number(3, 30)
    whole = below * each
    verb = d.pick("sells", "uses", "loses", "paints", "gives away")
    question = d.pick(
        f"{p} has {whole} {t} and {verb} {above}/{below} of them. How many {t} does {p.he} still "
        "have" + (" unpainted?" if verb == "paints" else "?"),
        f"Out of {whole} {t}, {p} {verb} {above}/{below}. How many {t} are not touched?",
    )
    steps = (
        f"One {PARTS[below]} of {whole} is {whole} / {below} = {each}.",
        f"{above}/{below} of {whole} is {above} * {each} = {above * each}.",
        f"{d.so()} {whole} - {above * each} = {whole - above * each} {t} are left.",
    )
    return solved(
        question, steps, whole - above * each, "{} " + t.many, whole=whole, above=above, below=below
    )


@family
def two_fractions(d: Draw) -> Problem:
    p = d.person()
    b, c = d.of((2, 3, 4, 5)), d.of((2, 3, 4, 5))
    unit = b * c * d.number(2, 20)
    thing, kind = d.pick(
        ("pages", "book"), ("kilometres", "trail"), ("metres", "wall"), ("tasks", "list")
    )
    question = d.pick(
        f"A {kind} has {unit} {thing}. On the first day {p} finishes 1/{b} of it and on the second "
        f"day 1/{c} of "
        f"what is left. How many {thing} remain after that?",
        f"{p} does 1/{b} of a {kind} of {unit} {thing} in the morning and 1/{c} of the rest in the "
        "evening. "
        f"How many {thing} are still to do?",
    )
    first = unit // b
    rest = unit - first
    second = rest // c
    steps = [
        f"The first part is {unit} / {b} = {first} {thing}, so {unit} - {first} = {rest} remain.",
        f"The second part is {rest} / {c} = {second} {thing}.",
        f"{rest} - {second} = {rest - second} {thing} remain.",
    ]
    return solved(question, steps, rest - second, "{} " + thing, b=b, c=c, whole=unit)


@family
def percent_of_group(d: Draw) -> Problem:
    percent, size = (
        d.of((10, 15, 20, 25, 30, 35, 40, 45, 60, 65, 70, 75, 80, 90)),
        d.number(20, 800, 20),
    )
    group, act = d.pick(
        ("pupils", "walk to school"),
        ("visitors", "bought a ticket early"),
        ("workers", "come by bike"),
        ("trees", "are oaks"),
        ("houses", "have a garden"),
        ("guests", "drink tea"),
        ("members", "play chess"),
        ("cars", "are red"),
        ("fish", "are carp"),
        ("letters", "are from abroad"),
    )
    question = d.pick(
        f"Of {size} {group}, {percent}% {act}. How many {group} do not?"
        if act.split()[0] not in ("are", "bought", "have")
        else f"There are {size} {group}, and {percent}% of them {act}. "
        "For how many is this not so?",
        f"{percent}% of {size} {group} {act}. For how many {group} is this not true?",
    )
    part = size * percent // 100
    steps = (
        f"{percent}% of {size} is {size} * {percent} / 100 = {part}.",
        f"The others are {size} - {part} = {size - part} {group}.",
    )
    return solved(question, steps, size - part, "{} " + group, size=size, percent=percent)


@family
def percent_growth(d: Draw) -> Problem:
    what = d.pick("town", "club", "library", "school", "colony of ants", "flock", "orchestra")
    of = {"library": "books", "colony of ants": "ants", "flock": "birds"}.get(what, "members")
    if what in ("town", "school"):
        of = "people" if what == "town" else "pupils"
    size, percent, more = d.number(100, 4000, 100), d.number(2, 45), d.number(3, 90)
    question = d.pick(
        f"A {what} has {size} {of}. In one year the number grows by {percent}%, and in the next "
        f"year {more} "
        f"more come. How many {of} are there then?",
        f"The number of {of} in a {what} was {size}. It rose by {percent}% and then by another "
        f"{more}. "
        "What is it now?",
    )
    grow = size * percent // 100
    steps = (
        f"The growth is {size} * {percent} / 100 = {grow}.",
        f"{size} + {grow} = {size + grow}.",
        f"{size + grow} + {more} = {size + grow + more} {of}.",
    )
    return solved(
        question, steps, size + grow + more, "{} " + of, size=size, percent=percent, more=more
    )


@family
def price_before(d: Draw) -> Problem:
    percent = d.of((10, 20, 25, 30, 40, 50, 60, 75))
    before = d.number(20, 600, 20)
    now = before * (100 - percent) // 100
    what = d.pick("coat", "bed", "watch", "radio", "carpet", "pair of boots", "printer", "sofa")
    question = d.pick(
        f"After a discount of {percent}% a {what} costs ${now}. What was the price before?",
        f"A {what} is sold for ${now}, which is {percent}% less than the old price. Find the old "
        "price.",
    )
    steps = (
        f"The new price is 100 - {percent} = {100 - percent} percent of the old one.",
        f"One percent is ${now} / {100 - percent} = {money(before)}.",
        f"The old price was 100 * {money(before)} = ${before}.",
    )
    return solved(question, steps, before, "${}", now=now, percent=percent)


@family
def ages_in_years(d: Draw) -> Problem:
    p, q = d.people(2)
    young, gap, years = d.number(3, 40), d.number(2, 30), d.number(2, 25)
    question = d.pick(
        f"{p} is {young} years old and {q} is {gap} years older. How old will the two be together "
        f"in {years} years?",
        f"{q} is {gap} years older than {p}, who is {young}. What will be the sum of their ages "
        f"{years} years from now?",
    )
    old = young + gap
    x, y = young + years, old + years
    steps = (
        f"{q} is {young} + {gap} = {old} years old.",
        f"In {years} years {p} will be {young} + {years} = {x} and {q} will be {old} + {years} = "
        f"{y}.",
        f"The sum is {x} + {y} = {x + y}.",
    )
    return solved(question, steps, x + y, "{}", young=young, gap=gap, years=years)


@family
def age_multiple(d: Draw) -> Problem:
    p, q = d.people(2)
    times, then, years = d.number(3, 6), d.number(5, 14), d.number(2, 12)
    now = times * then + years
    who = d.pick("uncle", "aunt", "teacher", "cousin", "neighbour", "coach")
    question = d.pick(
        f"{years} years ago {p}'s {who} {q} was {times} times as old as {p}. {q} is {now} now. How "
        f"old is {p} now?",
        f"{q}, the {who} of {p}, is {now} years old. {years} years ago {q}'s age was {times} times "
        f"{p}'s age. "
        f"Find the present age of {p}.",
    )
    steps = (
        f"{years} years ago {q} was {now} - {years} = {now - years} years old.",
        f"At that time {p} was {now - years} / {times} = {then}.",
        f"Now {p} is {then} + {years} = {then + years} years old.",
    )
    return solved(question, steps, then + years, "{} years", years=years, times=times, now=now)


@family
def ratio_share(d: Draw) -> Problem:
    p, q = d.people(2)
    x, y, unit = d.number(1, 9), d.number(1, 9), d.number(3, 40)
    t = d.thing()
    whole = (x + y) * unit
    question = d.pick(
        f"{p} and {q} divide {whole} {t} in the ratio {x}:{y}. How many {t} does {q} get?",
        f"The {t} of {p} and those of {q} are in the ratio {x} to {y}. Together they have {whole}. "
        f"How many belong to {q}?",
    )
    steps = (
        f"There are {x} + {y} = {x + y} equal parts.",
        f"One part is {whole} / {x + y} = {unit} {t}.",
        f"{q} gets {y} * {unit} = {y * unit} {t}.",
    )
    return solved(question, steps, y * unit, "{} " + t.many, x=x, y=y, whole=whole)


@family
def score_needed(d: Draw) -> Problem:
    p = d.person()
    tests, goal = d.number(3, 5), d.number(70, 90)
    scores = [d.number(60, 98) for _ in range(tests)]
    need = goal * (tests + 1) - sum(scores)
    while not 40 <= need <= 100:
        scores = [d.number(60, 98) for _ in range(tests)]
        need = goal * (tests + 1) - sum(scores)
    listed = ", ".join(map(str, scores[:-1])) + f" and {scores[-1]}"
    question = d.pick(
        f"{p} scored {listed} in {tests} tests. What must {p.he} score in the next test for an "
        f"average of {goal}?",
        f"The results of {p} so far are {listed}. Which result in the next test gives a mean of "
        f"exactly {goal}?",
    )
    total = sum(scores)
    steps = (
        f"The scores so far add up to {' + '.join(map(str, scores))} = {total}.",
        f"For the average, {tests + 1} tests need {tests + 1} * {goal} = {goal * (tests + 1)} "
        "points.",
        f"The next score must be {goal * (tests + 1)} - {total} = {need}.",
    )
    return solved(question, steps, need, "{}", total=total, tests=tests, goal=goal)


@family
def plain_average(d: Draw) -> Problem:
    p, t = d.person(), d.thing()
    count, mean = d.number(3, 6), d.number(10, 60)
    values = [d.number(mean - 9, mean + 9) for _ in range(count - 1)]
    values.append(count * mean - sum(values))
    while not 0 < values[-1] < 120:
        values = [d.number(mean - 9, mean + 9) for _ in range(count - 1)]
        values.append(count * mean - sum(values))
    listed = ", ".join(map(str, values[:-1])) + f" and {values[-1]}"
    question = d.pick(
        f"On {count} days {p} sold {listed} {t}. How many {t} is that per day on average?",
        f"{p} counted {listed} {t} in {count} boxes. What is the average number of {t} in a box?",
        f"Find the mean of the numbers {listed}.",
    )
    total = sum(values)
    steps = (
        f"The sum is {' + '.join(map(str, values))} = {total}.",
        f"The average is {total} / {count} = {mean}.",
    )
    return solved(question, steps, mean, "{}", total=total, count=count)


@family
def solution_strength(d: Draw) -> Problem:
    weak, strong = d.number(5, 45, 5), d.number(50, 90, 5)
    x, y = d.number(100, 900, 20), d.number(100, 900, 20)
    stuff = d.pick("salt", "sugar", "acid", "syrup", "alcohol", "lemon juice")
    question = d.pick(
        f"{x} grams of a mixture with {weak}% {stuff} are poured into {y} grams of a mixture with "
        f"{strong}% "
        f"{stuff}. How many grams of {stuff} are there {d.total()}?",
        f"A cook mixes {x} grams of a liquid that is {weak}% {stuff} with {y} grams of one that is "
        f"{strong}% "
        f"{stuff}. How much {stuff} is in the mixture?",
    )
    s, t = x * weak // 100, y * strong // 100
    steps = (
        f"The first holds {x} * {weak} / 100 = {s} grams of {stuff}.",
        f"The second holds {y} * {strong} / 100 = {t} grams.",
        f"Together there are {s} + {t} = {s + t} grams of {stuff}.",
    )
    return solved(question, steps, s + t, "{} grams", weak=weak, strong=strong, x=x, y=y)


@family
def mixed_price(d: Draw) -> Problem:
    p = d.person()
    one, two = d.pick(
        ("nuts", "raisins"), ("green tea", "black tea"), ("beans", "peas"), ("oats", "bran")
    )
    each, kilos = d.number(4, 20), d.number(2, 9)
    x = d.number(1, kilos + 4)
    low = d.number(2, each + 3)
    rest = each * (x + kilos) - low * x
    while rest <= 0 or rest % kilos:
        x, low = d.number(1, kilos + 4), d.number(2, each + 3)
        rest = each * (x + kilos) - low * x
    high = rest // kilos
    question = d.pick(
        f"{p} mixes {x} kg of {one} at ${low} per kg with {kilos} kg of {two} at ${high} per kg. "
        "What is a kilogram of the mixture worth?",
        f"A bag holds {x} kg of {one} that cost ${low} a kg and {kilos} kg of {two} that cost "
        f"${high} a kg. "
        "What is the price of one kg of this blend?",
    )
    steps = (
        f"The {one} cost {x} * ${low} = ${x * low} and the {two} cost {kilos} * ${high} = "
        f"${kilos * high}.",
        f"The mixture costs ${x * low} + ${kilos * high} = ${x * low + kilos * high} for {x} + "
        f"{kilos} = {x + kilos} kg.",
        f"One kg costs ${x * low + kilos * high} / {x + kilos} = ${each}.",
    )
    return solved(question, steps, each, "${}", x=x, low=low, kilos=kilos, high=high)


@family
def share_of_colour(d: Draw) -> Problem:
    t = d.thing()
    colours = d.rng.sample(
        ["red", "blue", "green", "yellow", "white", "black", "orange", "purple"], 3
    )
    whole = d.of((20, 25, 40, 50, 80, 100, 200))
    percent = d.of([k for k in range(5, 90, 5) if whole * k % 100 == 0])
    one = whole * percent // 100
    two = d.number(1, whole - one - 1)
    three = whole - one - two
    question = d.pick(
        f"A box holds {one} {colours[0]}, {two} {colours[1]} and {three} {colours[2]} {t}. "
        f"What percent of the {t} are {colours[0]}?",
        f"There are {two} {colours[1]}, {three} {colours[2]} and {one} {colours[0]} {t} on a "
        "table. "
        f"Which percentage is {colours[0]}?",
    )
    steps = (
        f"There are {one} + {two} + {three} = {whole} {t}.",
        f"The share of the {colours[0]} ones is {one} * 100 / {whole} = {percent} percent.",
    )
    return solved(question, steps, percent, "{}%", one=one, two=two, three=three)


@family
def map_scale(d: Draw) -> Problem:
    here, there = d.cities()
    cm, scale, speed = d.number(3, 30), d.number(2, 20), d.of((2, 4, 5, 10, 20))
    while cm * scale % speed or cm * scale == speed:
        cm, scale = d.number(3, 30), d.number(2, 20)
    question = d.pick(
        f"On a map 1 centimetre stands for {scale} kilometres. {here} and {there} are {cm} "
        "centimetres apart on "
        f"the map. How many hours does the way take at {speed} kilometres per hour?",
        f"A map shows {scale} kilometres as 1 centimetre. The road from {here} to {there} is {cm} "
        "centimetres "
        f"long on it. A cart goes {speed} kilometres an hour. How many hours does it need?",
    )
    steps = (
        f"The real distance is {cm} * {scale} = {cm * scale} kilometres.",
        f"The time is {cm * scale} / {speed} = {cm * scale // speed} hours.",
    )
    return solved(question, steps, cm * scale // speed, "{} hours", cm=cm, scale=scale, speed=speed)


@family
def doubling(d: Draw) -> Problem:
    start, rounds = d.number(2, 60), d.number(3, 6)
    what = d.pick("cells", "bacteria", "lilies", "rabbits", "followers", "mosquitoes")
    span = d.pick("hour", "day", "week", "month")
    question = d.pick(
        f"The number of {what} doubles every {span}. At first there are {start}. How many are "
        "there after "
        f"{rounds} {span}s?",
        f"There are {start} {what}, and each {span} their number doubles. How many {what} are "
        f"there {rounds} {span}s later?",
    )
    steps, now = [], start
    for turn in range(rounds):
        steps.append(f"After {turn + 1} {span}{'s' if turn else ''}: {now} * 2 = {now * 2}.")
        now *= 2
    return solved(question, steps, now, "{} " + what, start=start, rounds=rounds)
