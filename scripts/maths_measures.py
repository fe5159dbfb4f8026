"""Families of problems about length, area, volume, weight and work."""

from maths_words import Draw, Problem, family, solved


@family
def fence(d: Draw) -> Problem:
    p = d.person()
    long_, wide, price, gate = d.number(10, 60), d.number(5, 40), d.number(3, 25), d.number(2, 4)
    what = d.pick("garden", "field", "yard", "meadow", "vegetable patch", "playground")
    question = d.pick(
        f"{p} puts a fence around a rectangular {what} {long_} metres long and {wide} metres wide, "
        "except for a "
        f"gate of {gate} metres. A metre of fence costs ${price}. What does the fence cost?",
        f"A rectangular {what} measures {long_} by {wide} metres. A fence at ${price} a metre goes "
        "all the way "
        f"round but leaves a gap of {gate} metres for the gate. How much is the fence?",
    )
    half = long_ + wide
    need = 2 * half - gate
    steps = (
        f"The perimeter is 2 * ({long_} + {wide}) = {2 * half} metres.",
        f"Without the gate it is {2 * half} - {gate} = {need} metres.",
        f"The fence costs {need} * ${price} = ${need * price}.",
    )
    return solved(
        question, steps, need * price, "${}", long=long_, wide=wide, price=price, gate=gate
    )


@family
def tiles_for_floor(d: Draw) -> Problem:
    p = d.person()
    side, x, y = d.of((20, 25, 30, 40, 50)), d.number(6, 30), d.number(6, 30)
    room = d.pick("kitchen", "bathroom", "hall", "terrace", "balcony", "porch")
    question = d.pick(
        f"The floor of a {room} is {x * side} centimetres by {y * side} centimetres. {p} covers it "
        "with square "
        f"tiles of {side} centimetres a side. How many tiles does {p.he} need?",
        f"How many square tiles with sides of {side} centimetres cover a {room} floor of "
        f"{x * side} by "
        f"{y * side} centimetres?",
    )
    steps = (
        f"Along one side fit {x * side} / {side} = {x} tiles.",
        f"Along the other side fit {y * side} / {side} = {y} tiles.",
        f"The floor needs {x} * {y} = {x * y} tiles.",
    )
    return solved(question, steps, x * y, "{} tiles", side=side, long=x * side, wide=y * side)


@family
def path_around(d: Draw) -> Problem:
    long_, wide, edge = d.number(8, 40), d.number(5, 30), d.number(2, 4)
    what = d.pick("pool", "lawn", "flower bed", "pond", "sports field", "rug")
    question = d.pick(
        f"A {what} is {long_} metres long and {wide} metres wide. Around it runs a border {edge} "
        "metres wide. "
        "What is the area of the border?",
        f"Round a rectangular {what} of {long_} by {wide} metres there is a strip that is {edge} "
        "metres wide on "
        "every side. How many square metres does the strip cover?",
    )
    big_l, big_w = long_ + 2 * edge, wide + 2 * edge
    big, small = big_l * big_w, long_ * wide
    steps = (
        f"With the border the length is {long_} + 2 * {edge} = {big_l} and the width is {wide} + 2 "
        f"* {edge} = {big_w}.",
        f"The large area is {big_l} * {big_w} = {big} square metres.",
        f"The {what} itself is {long_} * {wide} = {small} square metres.",
        f"The border covers {big} - {small} = {big - small} square metres.",
    )
    return solved(
        question, steps, big - small, "{} square metres", long=long_, wide=wide, edge=edge
    )


@family
def filling_a_box(d: Draw) -> Problem:
    x, y, z, side = d.number(2, 8), d.number(2, 8), d.number(2, 8), d.number(2, 5)
    question = d.pick(
        f"A box is {x * side} cm long, {y * side} cm wide and {z * side} cm high. "
        f"How many cubes with edges of {side} cm fit into it?",
        f"How many cubes of {side} cm fill a container that measures {x * side} by {y * side} by "
        f"{z * side} cm?",
    )
    steps = (
        f"The box holds {x * side} * {y * side} * {z * side} = {x * y * z * side**3} cubic cm.",
        f"A cube has {side} * {side} * {side} = {side**3} cubic cm.",
        f"{d.so()} {x * y * z * side**3} / {side**3} = {x * y * z} cubes fit.",
    )
    return solved(
        question, steps, x * y * z, "{} cubes", x=x * side, y=y * side, z=z * side, side=side
    )


@family
def cutting_rope(d: Draw) -> Problem:
    p = d.person()
    stuff = d.pick("rope", "ribbon", "wire", "string", "cloth", "tape")
    metres, piece = d.number(2, 20), d.of((15, 20, 25, 30, 40, 60, 75))
    pieces, rest = divmod(metres * 100, piece)
    question = d.pick(
        f"{p} cuts {metres} metres of {stuff} into pieces of {piece} centimetres. How many whole "
        "pieces are there?",
        f"How many pieces of {piece} centimetres can {p} cut from {metres} metres of {stuff}?",
    )
    steps = [f"{metres} metres are {metres} * 100 = {metres * 100} centimetres."]
    if rest:
        steps += [
            f"{pieces} pieces use {pieces} * {piece} = {pieces * piece} centimetres.",
            f"The {metres * 100} - {pieces * piece} = {rest} centimetres left are too short for "
            "another piece.",
        ]
    else:
        steps.append(f"That gives {metres * 100} / {piece} = {pieces} pieces.")
    return solved(question, steps, pieces, "{} pieces", metres=metres, piece=piece)


@family
def weight_in_bags(d: Draw) -> Problem:
    p = d.person()
    stuff = d.pick("flour", "rice", "sugar", "coffee", "salt", "sand", "oats", "tea")
    grams, bags = d.of((125, 200, 250, 400, 500)), d.number(4, 20)
    whole = -(-grams * bags // 1000) + d.number(1, 5)
    left = whole * 1000 - grams * bags
    question = d.pick(
        f"{p} has {whole} kilograms of {stuff} and fills {bags} bags with {grams} grams each. "
        "How many grams are left?",
        f"From {whole} kilograms of {stuff}, {bags} bags of {grams} grams are packed. "
        f"How many grams of {stuff} remain?",
    )
    steps = (
        f"{whole} kilograms are {whole} * 1000 = {whole * 1000} grams.",
        f"The bags take {bags} * {grams} = {bags * grams} grams.",
        f"{d.so()} {whole * 1000} - {bags * grams} = {left} grams are left.",
    )
    return solved(question, steps, left, "{} grams", kilograms=whole, bags=bags, grams=grams)


@family
def machines(d: Draw) -> Problem:
    t = d.thing()
    rate, number, hours = d.number(5, 60), d.number(2, 12), d.number(2, 12)
    made = rate * number * hours
    question = d.pick(
        f"A machine makes {rate} {t} an hour. How many hours do {number} such machines need for "
        f"{made} {t}?",
        f"Each of {number} machines packs {rate} {t} per hour. After how many hours are {made} {t} "
        "packed?",
    )
    steps = (
        f"In one hour the machines handle {number} * {rate} = {number * rate} {t}.",
        f"They need {made} / {number * rate} = {hours} hours.",
    )
    return solved(question, steps, hours, "{} hours", rate=rate, number=number, made=made)


@family
def workers_and_days(d: Draw) -> Problem:
    days, workers, factor = d.number(2, 12), d.number(2, 12), d.number(2, 5)
    job = d.pick(
        "paint a school",
        "build a wall",
        "pick the fruit",
        "lay a road",
        "repair a roof",
        "dig a ditch",
    )
    question = d.pick(
        f"{workers} workers need {days * factor} days to {job}. How many days do "
        f"{workers * factor} workers need?",
        f"It takes {workers} people {days * factor} days to {job}. "
        f"At the same pace, how long do {workers * factor} people take?",
    )
    work = workers * days * factor
    steps = (
        f"The job is {workers} * {days * factor} = {work} days of work for one person.",
        f"{workers * factor} people finish it in {work} / {workers * factor} = {days} days.",
    )
    return solved(
        question, steps, days, "{} days", workers=workers, days=days * factor, more=workers * factor
    )


@family
def filling_a_tank(d: Draw) -> Problem:
    fill, minutes = d.number(8, 60), d.number(4, 40)
    leak = d.number(2, fill - 3)
    size = (fill - leak) * minutes
    what = d.pick("tank", "pool", "barrel", "bath", "basin", "water trough")
    question = d.pick(
        f"A pump pours {fill} litres a minute into an empty {what} of {size} litres, but {leak} "
        "litres a minute "
        "leak out. How many minutes does it take to fill it?",
        f"A {what} holds {size} litres. A hose adds {fill} litres each minute while {leak} litres "
        "drain away. "
        f"After how many minutes is the empty {what} full?",
    )
    steps = (
        f"Each minute {fill} - {leak} = {fill - leak} litres stay in.",
        f"It is full after {size} / {fill - leak} = {minutes} minutes.",
    )
    return solved(question, steps, minutes, "{} minutes", fill=fill, leak=leak, size=size)


@family
def triangle_angles(d: Draw) -> Problem:
    one, two = d.number(20, 85), d.number(20, 85)
    question = d.pick(
        f"Two angles of a triangle measure {one} and {two} degrees. How large is the third angle?",
        f"A triangle has an angle of {one} degrees and an angle of {two} degrees. Find the "
        "remaining angle.",
    )
    steps = (
        f"The two angles make {one} + {two} = {one + two} degrees.",
        f"The angles of a triangle sum to 180 degrees, so the third is 180 - {one + two} = "
        f"{180 - one - two} degrees.",
    )
    return solved(question, steps, 180 - one - two, "{} degrees", one=one, two=two)


@family
def recipe(d: Draw) -> Problem:
    p = d.person()
    stuff = d.pick("flour", "sugar", "butter", "rice", "milk powder", "oats", "chocolate")
    unit, dish = (
        d.pick("grams", "spoons"),
        d.pick("pancakes", "buns", "waffles", "pies", "dumplings"),
    )
    base, per, factor = d.number(2, 8), d.number(5, 40), d.number(2, 9)
    question = d.pick(
        f"For {base} {dish} one needs {base * per} {unit} of {stuff}. How much {stuff} does {p} "
        "need for "
        f"{base * factor} {dish}?",
        f"{p} uses {base * per} {unit} of {stuff} to make {base} {dish}. How many {unit} does "
        f"{p.he} use for "
        f"{base * factor} {dish}?",
    )
    steps = (
        f"One portion takes {base * per} / {base} = {per} {unit} of {stuff}.",
        f"For {base * factor} {dish} it is {base * factor} * {per} = {base * factor * per} {unit}.",
    )
    return solved(
        question,
        steps,
        base * factor * per,
        "{} " + unit,
        base=base,
        used=base * per,
        wanted=base * factor,
    )
