package rules

import (
	"errors"
	"os/exec"
)

// Purge removes every rule, chain and set of ours, of both families, from the calling thread's network
// namespace. Nothing there is no error. A family without a working iptables command has no rules of ours;
// only its sets are removed. The lock and the marks of cfg are used, nothing else of it matters.
func Purge(cfg Config) error {
	cfg = cfg.withDefaults()
	sets, err := dialSets()
	if err != nil {
		return err
	}
	err = purge(cfg, sets)
	return errors.Join(err, sets.close())
}

func purge(cfg Config, sets *setConn) error {
	var errs []error
	for _, f := range families() {
		// Where ip6tables does not work there are no rules of ours; were there some, their sets could not be
		// destroyed and that error would say so.
		if err := purgeRules(f, cfg); err != nil && !f.v6 && !errors.Is(err, exec.ErrNotFound) {
			errs = append(errs, err)
		}
		for _, s := range AllSets() {
			if err := sets.destroy(f, f.setName(s)); err != nil {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}
