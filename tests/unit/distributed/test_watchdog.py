"""The watchdog of one process: timeouts of phases, and what happens when the process is about to end."""

from __future__ import annotations

import threading

from hpc_supcon.distributed.watchdog import Watchdog


def test_only_training_steps_have_a_timeout_and_the_first_has_its_own(tmp_path):
    watchdog = Watchdog(tmp_path, step_timeout_s=1.0, first_step_timeout_s=9.0)
    with watchdog.training():
        assert watchdog.current_phase.timeout_s == 9
        watchdog.completed(1)
        assert watchdog.current_phase.timeout_s == 1
        for name in ("validation", "saving"):
            with watchdog.phase(name):
                assert watchdog.current_phase.timeout_s is None
        assert watchdog.current_phase.timeout_s == 1
    assert watchdog.current_phase.timeout_s is None


def test_the_main_thread_completes_no_step_once_the_process_is_about_to_end():
    """Otherwise the other ranks, which wait for it in a collective, could go on and finish the run."""
    for last_call in (lambda watchdog: watchdog.completed(2), lambda watchdog: watchdog.phase("saving").__enter__()):
        watchdog = Watchdog()
        assert not watchdog.completed(1)
        watchdog.freeze()
        main = threading.Thread(target=last_call, args=(watchdog,), daemon=True)
        main.start()
        main.join(0.2)
        assert main.is_alive()
        assert watchdog.step == 1


def test_a_phase_is_locked_only_where_it_may_exit():
    watchdog = Watchdog()
    with watchdog.phase("saving"):
        assert watchdog.lock_phase() is None
        assert not watchdog.completed(3), "and the main thread goes on"
    with watchdog.phase("validation", may_exit=True):
        watchdog.exiting = True
        assert watchdog.lock_phase() is None, "it has saved already"
        watchdog.exiting = False
        assert watchdog.lock_phase().name == "validation"
        watchdog.freeze()  # returns, although the lock is taken
        main = threading.Thread(target=watchdog.completed, args=(4,), daemon=True)
        main.start()
        main.join(0.2)
        assert main.is_alive()
        watchdog._phase_lock.release()
        main.join()
