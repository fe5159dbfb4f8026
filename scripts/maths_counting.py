"""Families of problems about counting, sharing, grouping and unknown numbers."""

from maths_words import DAYS, Draw, Problem, family, solved


@family
def gain_and_give(d: Draw) -> Problem:
    p, q = d.people(2)
    t = d.thing()
    start, more = d.number(12, 90), d.number(5, 60)
    given = d.number(3, start + more - 2)
    question = d.pick(
        f"{p} has {start} {t}. {p.He} gets {more} more and then gives {given} to {q}. "
        f"How many {t} does {p} have left?",
        f"After collecting {start} {t}, {p} finds another {more} and hands {given} of them to {q}. "
        f"How many {t} remain with {p}?",
        f"There were {start} {t} on {p}'s table. {q} put {more} {t} beside them and later took "
        f"{given} away. How many {t} are on the table now?",
    )
    have = start + more
    steps = (
        d.pick(
            f"After the gain there are {start} + {more} = {have} {t}.",
            f"{start} + {more} = {have} {t}.",
        ),
        f"{d.so()} {have} - {given} = {have - given} {t} are left.",
    )
    return solved(
        question, steps, have - given, "{} " + t.many, start=start, more=more, given=given
    )


@family
def times_as_many(d: Draw) -> Problem:
    p, q = d.people(2)
    t = d.thing()
    few, times = d.number(4, 60), d.number(2, 9)
    word = {2: d.pick("twice", "2 times"), 3: d.pick("three times", "3 times")}.get(
        times, f"{times} times"
    )
    question = d.pick(
        f"{p} has {few} {t}. {q} has {word} as many {t} as {p}. How many {t} do they have "
        f"{d.total()}?",
        f"{q} collected {word} as many {t} as {p}, who collected {few}. "
        f"What is the number of {t} that the two of them collected together?",
    )
    many = few * times
    steps = (
        f"{q} has {times} * {few} = {many} {t}.",
        d.pick(
            f"Together they have {few} + {many} = {few + many} {t}.",
            f"The sum is {few} + {many} = {few + many}.",
        ),
    )
    return solved(question, steps, few + many, "{} " + t.many, few=few, times=times)


@family
def fewer_than(d: Draw) -> Problem:
    p, q, r = d.people(3)
    t = d.thing()
    most = d.number(30, 120)
    less, extra = d.number(3, most - 5), d.number(2, 40)
    question = d.pick(
        f"{p} picked {most} {t}. {q} picked {less} fewer than {p}, and {r} picked {extra} more "
        f"than {q}. "
        f"How many {t} did {r} pick?",
        f"{q} owns {less} {t} less than {p}. {r} owns {extra} {t} more than {q}. "
        f"If {p} owns {most} {t}, how many does {r} own?",
    )
    middle = most - less
    steps = (
        f"{q} has {most} - {less} = {middle} {t}.",
        f"{r} has {middle} + {extra} = {middle + extra} {t}.",
    )
    return solved(
        question, steps, middle + extra, "{} " + t.many, most=most, less=less, extra=extra
    )


@family
def equal_groups(d: Draw) -> Problem:
    p, t, c = d.person(), d.thing(), d.container()
    groups, each = d.number(3, 25), d.number(4, 36)
    broken = d.number(2, min(19, groups * each - 2))
    question = d.pick(
        f"{p} fills {groups} {c} with {each} {t} each. Later {broken} {t} are sold. How many {t} "
        "are left?",
        f"A shop has {groups} {c} of {t}, and every {c.one} holds {each} {t}. "
        f"{p} buys {broken} {t}. How many {t} does the shop still have?",
        f"Each of {groups} {c} holds {each} {t}. When {p} counted, {broken} {t} were missing. "
        f"How many {t} did {p.he} count?",
    )
    full = groups * each
    steps = (
        d.pick(
            f"The {c} hold {groups} * {each} = {full} {t}.",
            f"{d.first()} there are {groups} * {each} = {full} {t}.",
        ),
        f"Taking away {broken} gives {full} - {broken} = {full - broken} {t}.",
    )
    return solved(
        question, steps, full - broken, "{} " + t.many, groups=groups, each=each, broken=broken
    )


@family
def share_equally(d: Draw) -> Problem:
    p, t = d.person(), d.thing()
    friends, each, kept = d.number(3, 15), d.number(3, 30), d.number(2, 25)
    all_of_them = friends * each + kept
    who = d.pick("friends", "cousins", "neighbours", "classmates", "children", "team mates")
    question = d.pick(
        f"{p} has {all_of_them} {t}. {p.He} keeps {kept} and shares the rest equally among "
        f"{friends} {who}. "
        f"How many {t} does each of the {who} get?",
        f"From a pile of {all_of_them} {t}, {p} sets {kept} aside and divides the others evenly "
        "between "
        f"{friends} {who}. How many does each receive?",
    )
    rest = all_of_them - kept
    steps = (
        f"There are {all_of_them} - {kept} = {rest} {t} to share.",
        f"Each gets {rest} / {friends} = {each} {t}.",
    )
    return solved(
        question, steps, each, "{} " + t.many, all=all_of_them, kept=kept, friends=friends
    )


@family
def rows_of_seats(d: Draw) -> Problem:
    rows, seats = d.number(6, 30), d.number(8, 40)
    taken = d.number(5, rows * seats - 5)
    hall = d.pick("theatre", "cinema", "concert hall", "circus tent", "lecture room", "school hall")
    question = d.pick(
        f"A {hall} has {rows} rows with {seats} seats in each row. On {d.of(DAYS)} {taken} people "
        "come. "
        "If everybody takes one seat, how many seats stay empty?",
        f"There are {rows} rows of {seats} seats in the {hall}. {taken} tickets were sold. "
        "How many seats are still free?",
    )
    seats_all = rows * seats
    steps = (
        f"The {hall} has {rows} * {seats} = {seats_all} seats.",
        f"{d.so()} {seats_all} - {taken} = {seats_all - taken} seats are empty.",
    )
    return solved(
        question, steps, seats_all - taken, "{} seats", rows=rows, seats=seats, taken=taken
    )


@family
def three_days(d: Draw) -> Problem:
    p, t = d.person(), d.thing()
    start = d.number(0, 4)
    one, two, three = DAYS[start : start + 3]
    base, more, times = d.number(5, 50), d.number(3, 30), d.number(2, 5)
    did = d.pick("sold", "packed", "counted", "painted", "sorted", "cleaned")
    question = d.pick(
        f"On {one} {p} {did} {base} {t}. On {two} {p.he} {did} {more} more than on {one}, and on "
        f"{three} "
        f"{times} times as many as on {one}. How many {t} were {did} over the three days?",
        f"{p} {did} {base} {t} on {one}, {more} {t} more than that on {two}, and {times} times the "
        "number "
        f"of {one} on {three}. What is the total for the three days?",
    )
    second, third = base + more, base * times
    steps = (
        f"On {two}: {base} + {more} = {second} {t}.",
        f"On {three}: {times} * {base} = {third} {t}.",
        f"{d.total().capitalize()}: {base} + {second} + {third} = {base + second + third} {t}.",
    )
    return solved(
        question, steps, base + second + third, "{} " + t.many, base=base, more=more, times=times
    )


@family
def bus_stops(d: Draw) -> Problem:
    vehicle = d.pick("bus", "train", "tram", "ferry", "boat")
    start, on1, on2 = d.number(15, 60), d.number(2, 20), d.number(2, 20)
    off1 = d.number(1, start - 2)
    off2 = d.number(1, start - off1 + on1 - 1)
    stop = "stop" if vehicle in ("bus", "train", "tram") else "pier"
    question = (
        f"A {vehicle} leaves {d.of(d.cities())} with {start} passengers. At the first {stop} "
        f"{off1} get off and "
        f"{on1} get on. At the second {stop} {off2} get off and {on2} get on. "
        + d.pick(f"How many passengers are on the {vehicle} now?", "How many passengers travel on?")
    )
    after1 = start - off1 + on1
    after2 = after1 - off2 + on2
    steps = (
        f"After the first {stop}: {start} - {off1} + {on1} = {after1} passengers.",
        f"After the second {stop}: {after1} - {off2} + {on2} = {after2} passengers.",
    )
    return solved(
        question,
        steps,
        after2,
        "{} passengers",
        start=start,
        off1=off1,
        on1=on1,
        off2=off2,
        on2=on2,
    )


@family
def pages_left(d: Draw) -> Problem:
    p = d.person()
    days, daily, left = d.number(3, 14), d.number(8, 45), d.number(10, 150)
    pages = days * daily + left
    kind = d.pick("novel", "history book", "book of tales", "biography", "guide book", "comic book")
    question = d.pick(
        f"{p} is reading a {kind} of {pages} pages. {p.He} reads {daily} pages a day for {days} "
        "days. "
        "How many pages are left?",
        f"A {kind} has {pages} pages. If {p} reads {daily} pages every day, how many pages will "
        f"{p.he} "
        f"still have to read after {days} days?",
    )
    read = days * daily
    steps = (
        f"In {days} days {p} reads {days} * {daily} = {read} pages.",
        f"{d.so()} {pages} - {read} = {left} pages are left.",
    )
    return solved(question, steps, left, "{} pages", pages=pages, daily=daily, days=days)


@family
def think_of_a_number(d: Draw) -> Problem:
    p = d.person()
    secret, times, plus = d.number(2, 60), d.number(2, 12), d.number(1, 50)
    result = secret * times + plus
    question = d.pick(
        f"{p} thinks of a number, multiplies it by {times} and adds {plus}. The result is "
        f"{result}. "
        f"What number did {p} think of?",
        f"If a number is multiplied by {times} and then increased by {plus}, we get {result}. Find "
        "the number.",
    )
    steps = (
        f"Before {plus} was added there were {result} - {plus} = {result - plus}.",
        f"Before the multiplication there were {result - plus} / {times} = {secret}.",
    )
    return solved(question, steps, secret, "{}", result=result, times=times, plus=plus)


@family
def heads_and_legs(d: Draw) -> Problem:
    p = d.person()
    two = d.pick("chickens", "ducks", "geese", "turkeys")
    four = d.pick("goats", "cows", "sheep", "pigs", "rabbits", "horses")
    birds, beasts = d.number(3, 40), d.number(2, 30)
    heads, legs = birds + beasts, 2 * birds + 4 * beasts
    question = d.pick(
        f"{p} keeps {two} and {four}. Together they have {heads} heads and {legs} legs. "
        f"How many {four} does {p} keep?",
        f"On {p}'s farm there are {heads} animals, some {two} and some {four}. "
        f"{p.He} counts {legs} legs. How many {four} are there?",
    )
    steps = (
        f"If all {heads} animals were {two}, there would be {heads} * 2 = {2 * heads} legs.",
        f"There are {legs} - {2 * heads} = {legs - 2 * heads} legs more than that.",
        f"Each of the {four} has 2 more legs, so there are {legs - 2 * heads} / 2 = {beasts} "
        f"{four}.",
    )
    return solved(question, steps, beasts, "{} " + four, heads=heads, legs=legs)


@family
def consecutive_numbers(d: Draw) -> Problem:
    middle = d.number(4, 300)
    largest = d.pick(True, False)
    which = "largest" if largest else "smallest"
    question = d.pick(
        f"The sum of three consecutive whole numbers is {3 * middle}. What is the {which} of them?",
        f"Three whole numbers that follow one another add up to {3 * middle}. Find the {which} "
        "one.",
    )
    answer = middle + 1 if largest else middle - 1
    sign = "+" if largest else "-"
    steps = (
        f"The middle number is {3 * middle} / 3 = {middle}.",
        f"The {which} number is {middle} {sign} 1 = {answer}.",
    )
    return solved(question, steps, answer, "{}", sum=3 * middle, largest=int(largest))


@family
def packs_needed(d: Draw) -> Problem:
    p, t = d.person(), d.thing()
    guests, each, pack = d.number(25, 60), d.number(2, 6), d.number(6, 24)
    need = guests * each
    packs, rest = divmod(need, pack)
    where = d.pick("party", "picnic", "workshop", "class", "camp", "fair")
    question = (
        f"{p} expects {guests} people at the {where} and wants to give {each} {t} to each of them. "
        + d.pick(
            f"The {t} come in packs of {pack}. How many packs must {p.he} buy?",
            f"A pack holds {pack} {t}. What is the smallest number of packs that is enough?",
        )
    )
    steps = [f"{p} needs {guests} * {each} = {need} {t}."]
    if rest:
        steps += [
            f"{packs} packs hold {packs} * {pack} = {packs * pack} {t}, which leaves {need} - "
            f"{packs * pack} = {rest} missing.",
            f"One more pack is needed: {packs} + 1 = {packs + 1}.",
        ]
        packs += 1
    else:
        steps.append(f"The number of packs is {need} / {pack} = {packs}.")
    return solved(question, steps, packs, "{} packs", guests=guests, each=each, pack=pack)


@family
def growing_pattern(d: Draw) -> Problem:
    p, t = d.person(), d.thing()
    first, more, days = d.number(2, 20), d.number(2, 9), d.number(4, 7)
    verb = d.pick("collects", "makes", "draws", "arranges")
    question = d.pick(
        f"{p} {verb} {first} {t} on the first day and each day {more} more than on the day before. "
        f"How many {t} is that on day {days}?",
        f"On day 1 {p} {verb} {first} {t}. Every following day {p.he} {verb} {more} more than the "
        "day "
        f"before. How many {t} on day {days}?",
    )
    grown = (days - 1) * more
    steps = (
        f"From day 1 to day {days} the number grows {days} - 1 = {days - 1} times.",
        f"The growth is {days - 1} * {more} = {grown} {t}.",
        f"On day {days} it is {first} + {grown} = {first + grown} {t}.",
    )
    return solved(question, steps, first + grown, "{} " + t.many, first=first, more=more, days=days)


@family
def sum_and_difference(d: Draw) -> Problem:
    p, q = d.people(2)
    t = d.thing()
    less, gap = d.number(5, 90), d.number(2, 50)
    both = 2 * less + gap
    question = d.pick(
        f"{p} and {q} have {both} {t} {d.total()}. {p} has {gap} more than {q}. How many {t} does "
        f"{p} have?",
        f"Two children, {p} and {q}, share {both} {t} so that {p} gets {gap} more than {q}. How "
        f"many go to {p}?",
    )
    steps = (
        f"Without the extra {gap}, both would have the same: {both} - {gap} = {both - gap}.",
        f"{q} has {both - gap} / 2 = {less} {t}.",
        f"{p} has {less} + {gap} = {less + gap} {t}.",
    )
    return solved(question, steps, less + gap, "{} " + t.many, both=both, gap=gap)
