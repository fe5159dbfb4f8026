"""Families of problems about prices, wages, savings and coins."""

from maths_words import Draw, Problem, a, family, money, solved


@family
def change_from_bill(d: Draw) -> Problem:
    p = d.person()
    s, t = d.wares(2)
    n, m, x, y = d.number(2, 6), d.number(2, 6), d.number(2, 15), d.number(2, 15)
    cost = n * x + m * y
    bill = next(b for b in (20, 50, 100, 200, 500) if b > cost)
    question = d.pick(
        f"At {d.place()} {p} buys {n} {s} for ${x} each and {m} {t} for ${y} each. "
        f"{p.He} pays with ${bill}. How much change does {p.he} get?",
        f"{a(s.one).capitalize()} costs ${x} and {a(t.one)} costs ${y}. {p} takes {n} {s} and {m} "
        f"{t} and "
        f"hands over ${bill}. How much money does {p.he} get back?",
    )
    steps = (
        f"The {s} cost {n} * ${x} = ${n * x}.",
        f"The {t} cost {m} * ${y} = ${m * y}.",
        f"{d.total().capitalize()} that is ${n * x} + ${m * y} = ${cost}.",
        f"The change is ${bill} - ${cost} = ${bill - cost}.",
    )
    return solved(question, steps, bill - cost, "${}", n=n, x=x, m=m, y=y, bill=bill)


@family
def price_in_cents(d: Draw) -> Problem:
    p, t = d.person(), d.thing()
    count, cents = d.number(3, 24), d.number(15, 495, 5)
    question = d.pick(
        f"One {t.one} costs {money(cents)}. How much do {count} {t} cost?",
        f"{p} buys {count} {t} at {d.place()} for {money(cents)} each. What does {p.he} pay?",
        f"What is the price of {count} {t} if a single {t.one} sells for {money(cents)}?",
    )
    cost = count * cents
    steps = (
        f"{d.pick('The price', 'The cost', 'The total')} is {count} * {money(cents)} = "
        f"{money(cost)}.",
    )
    return solved(question, steps, cost / 100, money(cost), count=count, cents=cents)


@family
def overtime(d: Draw) -> Problem:
    p = d.person()
    wage, hours, extra = d.number(8, 30, 2), d.number(20, 40), d.number(2, 12)
    job = d.pick("baker", "driver", "gardener", "nurse", "cook", "painter", "mechanic", "clerk")
    more = wage // 2
    question = d.pick(
        f"{p} works as {a(job)} for ${wage} an hour. An hour of overtime pays ${more} more. "
        f"This week {p.he} worked {hours} normal hours and {extra} hours of overtime. How much did "
        f"{p.he} earn?",
        f"{a(job).capitalize()} earns ${wage} per hour and ${more} extra for each overtime hour. "
        f"How much does {p} earn as {a(job)} with {hours} regular and {extra} overtime hours?",
    )
    high = wage + more
    steps = (
        f"The normal hours pay {hours} * ${wage} = ${hours * wage}.",
        f"An hour of overtime pays ${wage} + ${more} = ${high}.",
        f"The overtime pays {extra} * ${high} = ${extra * high}.",
        f"{d.total().capitalize()}: ${hours * wage} + ${extra * high} = "
        f"${hours * wage + extra * high}.",
    )
    answer = hours * wage + extra * high
    return solved(question, steps, answer, "${}", wage=wage, more=more, hours=hours, extra=extra)


@family
def profit(d: Draw) -> Problem:
    p, t = d.person(), d.wares(1)[0]
    count, cost, gain = d.number(5, 40), d.number(3, 30), d.number(1, 15)
    rent = d.number(2, count * gain - 1)
    question = d.pick(
        f"{p} buys {count} {t} for ${cost} each and sells them all for ${cost + gain} each. "
        f"The market stall costs ${rent}. What is {p.his} profit?",
        f"A trader pays ${cost} for each of {count} {t}, sells each for ${cost + gain} and pays "
        f"${rent} "
        "for the stand. How much does the trader gain?",
    )
    steps = (
        f"Each {t.one} brings ${cost + gain} - ${cost} = ${gain}.",
        f"All of them bring {count} * ${gain} = ${count * gain}.",
        f"After the stall is paid, ${count * gain} - ${rent} = ${count * gain - rent} remain.",
    )
    return solved(
        question,
        steps,
        count * gain - rent,
        "${}",
        count=count,
        cost=cost,
        price=cost + gain,
        rent=rent,
    )


@family
def saving_weeks(d: Draw) -> Problem:
    p, t = (
        d.person(),
        d.pick("bicycle", "guitar", "camera", "tent", "telescope", "tablet", "desk", "piano"),
    )
    weekly, weeks, have = d.number(4, 25), d.number(4, 30), d.number(5, 90)
    price = have + weekly * weeks
    question = d.pick(
        f"{p} wants to buy a {t} for ${price}. {p.He} has ${have} and saves ${weekly} a week. "
        f"In how many weeks will {p.he} have enough?",
        f"A {t} costs ${price}. {p} already has ${have}. If {p.he} puts ${weekly} aside each week, "
        "how many weeks does it take?",
    )
    steps = (
        f"{p} still needs ${price} - ${have} = ${price - have}.",
        f"That takes {price - have} / {weekly} = {weeks} weeks.",
    )
    return solved(question, steps, weeks, "{} weeks", price=price, have=have, weekly=weekly)


@family
def discount(d: Draw) -> Problem:
    p, t = d.person(), d.wares(1)[0]
    percent, price = d.of((5, 10, 15, 20, 25, 30, 40, 50, 60, 75)), d.number(20, 400, 20)
    question = d.pick(
        f"{a(t.one).capitalize()} costs ${price}. In the sale it is {percent}% cheaper. What is "
        "the sale price?",
        f"{p} finds {a(t.one)} marked ${price} with a discount of {percent}%. How much does {p.he} "
        "pay?",
        f"The shop takes {percent}% off {a(t.one)} that was ${price}. What does it cost now?",
    )
    off = price * percent // 100
    steps = (
        f"The discount is ${price} * {percent} / 100 = ${off}.",
        f"The new price is ${price} - ${off} = ${price - off}.",
    )
    return solved(question, steps, price - off, "${}", price=price, percent=percent)


@family
def bill_with_tip(d: Draw) -> Problem:
    p = d.person()
    people, percent = d.number(3, 10), d.of((5, 10, 15, 20, 25))
    bill = d.number(2, 24) * people * 20
    tip = bill * percent // 100
    each = (bill + tip) // people
    group = d.pick("friends", "colleagues", "students", "players")
    question = d.pick(
        f"{people} {group} share a restaurant bill of ${bill}. They add a tip of {percent}% and "
        "pay equal "
        "shares. How much does each of them pay?",
        f"{p} and {people - 1} others eat together. The meal costs ${bill} and the tip is "
        f"{percent}%. "
        f"If all pay the same, what is {p}'s share?",
    )
    steps = (
        f"The tip is ${bill} * {percent} / 100 = ${tip}.",
        f"With the tip it is ${bill} + ${tip} = ${bill + tip}.",
        f"Each pays ${bill + tip} / {people} = ${each}.",
    )
    return solved(question, steps, each, "${}", bill=bill, percent=percent, people=people)


@family
def cheaper_pack(d: Draw) -> Problem:
    t = d.thing()
    pack, single, saved = d.number(4, 20), d.number(3, 12), d.number(2, 11)
    price = pack * single - saved
    packs = d.number(2, 6)
    question = d.pick(
        f"A single {t.one} costs ${single}. A pack of {pack} {t} costs ${price}. "
        f"How much is saved by buying {packs} packs instead of the same number of single {t}?",
        f"{t.many.capitalize()} cost ${single} each, or ${price} for {pack}. "
        f"What do you save if you buy {packs} packs of {pack} and not single {t}?",
    )
    steps = (
        f"{pack} single {t} cost {pack} * ${single} = ${pack * single}.",
        f"One pack saves ${pack * single} - ${price} = ${saved}.",
        f"{packs} packs save {packs} * ${saved} = ${packs * saved}.",
    )
    return solved(
        question, steps, packs * saved, "${}", pack=pack, single=single, price=price, packs=packs
    )


@family
def coins(d: Draw) -> Problem:
    p = d.person()
    quarters, dimes, nickels = d.number(2, 30), d.number(2, 30), d.number(2, 30)
    question = d.pick(
        f"{p} has {quarters} quarters, {dimes} dimes and {nickels} nickels. How much money is "
        "that?",
        f"In {p}'s jar there are {nickels} nickels, {dimes} dimes and {quarters} quarters. "
        "What are the coins worth?",
    )
    q, m, n = quarters * 25, dimes * 10, nickels * 5
    steps = (
        f"The quarters are worth {quarters} * 25 = {q} cents.",
        f"The dimes are worth {dimes} * 10 = {m} cents.",
        f"The nickels are worth {nickels} * 5 = {n} cents.",
        f"The sum is {q} + {m} + {n} = {q + m + n} cents, or {money(q + m + n)}.",
    )
    return solved(
        question,
        steps,
        (q + m + n) / 100,
        money(q + m + n),
        quarters=quarters,
        dimes=dimes,
        nickels=nickels,
    )


@family
def monthly_or_yearly(d: Draw) -> Problem:
    p = d.person()
    what = d.pick("gym", "music service", "newspaper", "chess club", "swimming pool", "film club")
    month, saved = d.number(5, 45), d.number(5, 40)
    year = 12 * month - saved
    question = d.pick(
        f"The {what} charges ${month} a month or ${year} a year. How much does {p} save in a year "
        "by "
        "paying once a year?",
        f"{p} pays ${month} every month for the {what}. The yearly price is ${year}. "
        "How much cheaper is the yearly price?",
    )
    steps = (
        f"Twelve months cost 12 * ${month} = ${12 * month}.",
        f"The saving is ${12 * month} - ${year} = ${saved}.",
    )
    return solved(question, steps, saved, "${}", month=month, year=year)


@family
def simple_interest(d: Draw) -> Problem:
    p = d.person()
    sum_, rate, years = d.number(200, 5000, 100), d.number(2, 9), d.number(2, 8)
    question = d.pick(
        f"{p} lends ${sum_} at {rate}% simple interest per year. How much is owed after {years} "
        "years?",
        f"A bank pays {rate}% simple interest a year. {p} deposits ${sum_}. "
        f"How much money is in the account after {years} years?",
    )
    yearly = sum_ * rate // 100
    steps = (
        f"The interest of one year is ${sum_} * {rate} / 100 = ${yearly}.",
        f"In {years} years it is {years} * ${yearly} = ${years * yearly}.",
        f"{d.total().capitalize()}: ${sum_} + ${years * yearly} = ${sum_ + years * yearly}.",
    )
    return solved(question, steps, sum_ + years * yearly, "${}", sum=sum_, rate=rate, years=years)


@family
def tickets(d: Draw) -> Problem:
    p = d.person()
    adults, children, low, gap = d.number(2, 40), d.number(2, 60), d.number(3, 12), d.number(2, 12)
    where = d.pick("zoo", "museum", "circus", "aquarium", "castle", "theme park", "planetarium")
    high = low + gap
    question = d.pick(
        f"A ticket for the {where} costs ${high} for adults and ${low} for children. "
        f"How much do {adults} adults and {children} children pay {d.total()}?",
        f"{p} sells tickets at the {where}: ${low} for a child and ${high} for an adult. Today "
        f"{children} "
        f"children and {adults} adults came. How much did {p.he} take?",
    )
    x, y = adults * high, children * low
    steps = (
        f"The adults pay {adults} * ${high} = ${x}.",
        f"The children pay {children} * ${low} = ${y}.",
        f"Together that is ${x} + ${y} = ${x + y}.",
    )
    return solved(
        question, steps, x + y, "${}", adults=adults, children=children, high=high, low=low
    )


@family
def raise_in_pay(d: Draw) -> Problem:
    p = d.person()
    pay, more, months = d.number(1200, 4000, 50), d.number(50, 400, 10), d.number(2, 10)
    question = d.pick(
        f"{p} earns ${pay} a month. After {months} months the pay rises by ${more} a month. "
        "How much does " + f"{p.he} earn in the whole year of 12 months?",
        f"For the first {months} months of the year {p} is paid ${pay} a month, and ${more} a "
        "month more "
        "for the rest of the year. What is the income of the year?",
    )
    rest = 12 - months
    x, y = months * pay, rest * (pay + more)
    steps = (
        f"The first months bring {months} * ${pay} = ${x}.",
        f"The rest of the year has 12 - {months} = {rest} months at ${pay} + ${more} = "
        f"${pay + more}.",
        f"They bring {rest} * ${pay + more} = ${y}.",
        f"The income of the year is ${x} + ${y} = ${x + y}.",
    )
    return solved(question, steps, x + y, "${}", pay=pay, more=more, months=months)
