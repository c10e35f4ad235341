"""`mixtral-jax serve`: checks the flags, and starts the service and the gateway with them."""

import os
import sys
import threading
import webbrowser
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mixtral_jax.cli.banner import banner, shown_key
from serving.command_line import command
from serving.errors import SetupError
from serving.flags import (
    GATEWAY,
    GROUP_KEY_VARIABLE,
    KEY_VARIABLE,
    SERVE,
    arguments,
    defaults,
    record,
    secrets,
)

if TYPE_CHECKING:
    from serving.cluster.rank import Rank
    from serving.launch.supervisor import Addresses


def _serve(given: dict[str, Any]) -> None:
    """Serve a model over HTTP and gRPC until Ctrl-C.

    The key that clients must send is taken from MIXTRAL_JAX_API_KEY. Without it, and without
    --keys, --entra-tenant and --no-auth, one is made up: it is printed to a terminal, else written
    to a file whose path is printed.

    With --tls-cert HTTP is served over TLS, and gRPC on 127.0.0.1 only.

    On several hosts, run the same command with --coordinator on each; process 0 serves. They prove
    to one another that they have the key in MIXTRAL_JAX_GROUP_KEY, which is made up and kept for
    processes of one user on one machine.
    """
    from serving.access.loopback import is_loopback
    from serving.channel import join_address
    from serving.cluster.local_key import default_key_file, local_key
    from serving.cluster.rank import Rank, RankError, split_coordinator
    from serving.engine.config import EngineConfig
    from serving.launch.config import ServiceConfig
    from serving.launch.supervisor import Addresses, kept_ports, run_follower
    from serving.parent import end_with_parent

    end_with_parent()
    environment = dict(os.environ)
    coordinator = given["coordinator"]
    if coordinator and not given["group_key"] and is_loopback(split_coordinator(coordinator)[0]):
        environment[GROUP_KEY_VARIABLE] = given["group_key"] = local_key(default_key_file())
    rank = record(Rank.of_flags, given)
    if given["tls_client_ca"] and rank is None:
        raise RankError("--tls-client-ca is for several processes; it needs --coordinator")
    engine = record(EngineConfig, given)
    addresses = Addresses(
        host=given["host"],
        port=given["port"],
        grpc_port=given["grpc_port"],
        tls=given["tls_cert"] is not None,
    )
    # The gateway alone waits for load balancers; the service gets its signal after that.
    service = record(ServiceConfig, given, port=addresses.grpc_port, drain_delay=0.0)
    if rank is None or rank.is_leader:
        given |= {"tls_client_ca": None} if rank is None else _tls_to_service(rank)
        # A gateway's one connection would reach one of several processes that share a port.
        several = service.service_processes if service.service_processes > 1 else 0
        with kept_ports(several) as ports:
            service = replace(service, text_port=ports)
            targets = tuple(join_address("127.0.0.1", port) for port in ports)
            given["target"] = targets or (addresses.target,)
            _lead(given, addresses, environment, arguments(engine, rank, service))
        return
    joined = (
        f"\nprocess {rank.process_id} of {rank.num_processes} of the group at {rank.coordinator}\n"
    )
    run_follower(
        environment,
        arguments(engine, rank, service),
        lambda: print(joined, flush=True),
        drain_seconds=service.drain_seconds,
    )


def _tls_to_service(rank: "Rank") -> dict[str, Any]:
    """Returns the gateway's flags for a service that leads a group with certificates of its own."""
    if rank.tls_client_ca is None:
        return {}
    return {
        "service_ca": rank.tls_client_ca,
        "service_cert": rank.tls_cert,
        "service_key": rank.tls_key,
        "service_name": rank.host,
        "tls_client_ca": None,  # HTTP asks for keys, not for certificates
    }


def _lead(
    given: dict[str, Any],
    addresses: "Addresses",
    environment: dict[str, str],
    engine_arguments: list[str],
) -> None:
    """Runs a service and a gateway before it."""
    from serving.access.config import AccessConfig
    from serving.accounting.config import AccountingConfig
    from serving.accounting.ledger import default_ledger_file
    from serving.gateway.config import GatewayConfig
    from serving.gateway.http.limits import HttpLimits
    from serving.launch.supervisor import environment_from, run

    if given["open"] and not given["page"]:
        raise SetupError("--open shows the page that --no-page turns off; leave one of them out")
    makes_key = not (
        environment.get(KEY_VARIABLE) or given["keys"] or given["entra_tenant"] or given["no_auth"]
    )
    environment = environment_from(environment, makes_key=makes_key)
    given = defaults(GATEWAY) | given | secrets(environment)
    given["usage_db"] = given["usage_db"] or default_ledger_file()
    web = record(AccessConfig, given, admits_gateway=False)
    # Files that cannot be used are told now, and not after minutes of loading.
    web.access()
    web.certificate()
    local = {"host": addresses.grpc_host, "tls_cert": None, "tls_key": None}
    grpc = record(AccessConfig, given | local, admits_gateway=True)
    gateway = record(
        GatewayConfig,
        given,
        gateway_key=web.key_for_service(),
        metrics_port=given["gateway_metrics_port"],
    )
    http = record(HttpLimits, given)
    addresses.check()  # before a file is written that another server on this port may have written
    key, bearer = shown_key(
        given["api_key"],
        addresses.port,
        is_made_up=makes_key,
        asks_key=not given["no_auth"],
        has_file=given["keys"] is not None,
        is_terminal=sys.stdout.isatty(),
    )
    text = banner(
        addresses.url, addresses.target, key, bearer, page=addresses.page if given["page"] else None
    )
    run(
        addresses,
        environment,
        [*engine_arguments, *arguments(grpc, record(AccountingConfig, given))],
        arguments(gateway, web, http),
        lambda: _announce(text, addresses.page if given["open"] else None),
        drain_seconds=gateway.drain_seconds,
        drain_delay=gateway.drain_delay,
        step_timeout=given["step_timeout"],
    )


def _announce(text: str, page: str | None) -> None:
    """Prints the banner, and opens a page in the user's browser unless it is None."""
    print(text, flush=True)
    if page is not None:
        # A browser of the terminal lasts until it is closed, and the server is watched meanwhile.
        threading.Thread(target=_open, args=(page,), daemon=True).start()


def _open(page: str) -> None:
    if not webbrowser.open(page):
        print(f"mixtral-jax: there is no browser here; open {page}", file=sys.stderr, flush=True)


serve = command(_serve, SERVE)
