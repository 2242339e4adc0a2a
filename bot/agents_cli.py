"""
`python -m bot agents add|list|disable|enable|password`: accounts of agents, in the server's database.

Works beside a running server: it appends no events. A password is typed (twice) or comes on stdin, never as an
argument, which every process of the machine could read.
"""

from __future__ import annotations

import argparse
import asyncio
import getpass
import json
import sys
from pathlib import Path
from typing import Any

from bot.agents.accounts import Accounts
from bot.agents.people import Agent
from bot.agents.records import Records
from bot.errors import BadFrame, Conflict, MerchantError
from bot.settings import Settings
from bot.storage import Storage


def add_parser(commands: Any) -> None:
    """Add `agents` and its own commands to the command line of `python -m bot`."""
    agents = commands.add_parser("agents", help="accounts of the inbox: add, list, disable, enable, password")
    actions = agents.add_subparsers(dest="action", required=True)
    add = actions.add_parser("add", help="make an account; the first one should be --role merchant")
    add.add_argument("--name", help="what visitors and colleagues see; the login where left out")
    add.add_argument("--role", choices=("agent", "merchant"), default="agent", help="default agent")
    listing = actions.add_parser("list", help="list accounts")
    listing.add_argument("--json", action="store_true", help="print exactly one JSON document")
    disable = actions.add_parser("disable", help="end an account's sessions and let nobody sign in with it")
    enable = actions.add_parser("enable", help="let a disabled account sign in again")
    password = actions.add_parser("password", help="set another password; the account's sessions end")
    for command in (add, disable, enable, password):
        command.add_argument("login", metavar="LOGIN")
    for command in (add, password):
        command.add_argument("--password-stdin", action="store_true", help="read the password from stdin, one line")
    for command in (add, listing, disable, enable, password):
        command.add_argument("--data", type=Path, metavar="DIR", help="the server's --data folder (var/)")


def run(args: argparse.Namespace) -> int:
    """
    Run one command; return the exit status.

    Raises:
        MerchantError: a login or password that cannot be used, an unknown account, no database.
    """
    given = {"data": args.data} if args.data is not None else {}
    return asyncio.run(_run(args, Settings(**given)))


async def _run(args: argparse.Namespace, settings: Settings) -> int:
    storage = Storage(settings.database())
    await storage.open(shared=True)
    try:
        return await _ACTIONS[args.action](args, Accounts(Records(storage)))
    except BadFrame as exc:
        raise MerchantError(str(exc)) from None
    finally:
        await storage.close()


async def _add(args: argparse.Namespace, accounts: Accounts) -> int:
    if any(agent.login == args.login.strip().lower() for agent in await accounts.records.agents()):
        raise MerchantError(f"there is an account {args.login!r} already; choose another login")
    try:
        agent = await accounts.add(args.login, args.name or args.login, args.role, _password(args))
    except Conflict:
        raise MerchantError(f"there is an account {args.login!r} already; choose another login") from None
    print(f"{agent.role} {agent.login} ({agent.name}) may sign in at /inbox")
    return 0


async def _list(args: argparse.Namespace, accounts: Accounts) -> int:
    agents = await accounts.records.agents()
    if args.json:
        print(json.dumps([{**a.public(), "disabled": a.disabled} for a in agents], ensure_ascii=False))
        return 0
    for agent in agents:
        print("\t".join([agent.login, agent.role, agent.name, *(["(disabled)"] if agent.disabled else [])]))
    if not agents:
        print("no accounts yet: python -m bot agents add LOGIN --role merchant", file=sys.stderr)
    return 0


async def _disable(args: argparse.Namespace, accounts: Accounts) -> int:
    await accounts.records.set_disabled((await _find(args, accounts)).id, True)
    return 0


async def _enable(args: argparse.Namespace, accounts: Accounts) -> int:
    await accounts.records.set_disabled((await _find(args, accounts)).id, False)
    return 0


async def _set_password(args: argparse.Namespace, accounts: Accounts) -> int:
    agent = await _find(args, accounts)
    await accounts.set_password(agent, _password(args))
    return 0


async def _find(args: argparse.Namespace, accounts: Accounts) -> Agent:
    for agent in await accounts.records.agents():
        if agent.login == args.login.strip().lower():
            return agent
    raise MerchantError(f"there is no account {args.login!r}; see: python -m bot agents list")


def _password(args: argparse.Namespace) -> str:
    if args.password_stdin or not sys.stdin.isatty():
        line = sys.stdin.readline().rstrip("\r\n")
        if not line:
            raise MerchantError("no password on stdin; give one as its first line")
        return line
    first = getpass.getpass("Password: ")
    if getpass.getpass("Again: ") != first:
        raise MerchantError("the two passwords differ; try again")
    return first


_ACTIONS = {"add": _add, "list": _list, "disable": _disable, "enable": _enable, "password": _set_password}
