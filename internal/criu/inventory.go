package criu

import (
	"path/filepath"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	"google.golang.org/protobuf/proto"
)

// lockNames are CRIU's network locks by their number (criu/include/cr_options.h).
var lockNames = []string{"iptables", "nftables", LockSkip}

// LockSkip is --network-lock skip: CRIU drops no packet of the connections.
const LockSkip = "skip"

// NetworkLock tells with which lock images were written.
func NetworkLock(dir string) (string, error) {
	lock := lockNames[0]
	// This image alone has one (do_open_image, img_write_magic).
	err := entriesBehind(filepath.Join(dir, "inventory.img"), func(b []byte) error {
		var e inventory.InventoryEntry
		if err := proto.Unmarshal(b, &e); err != nil {
			return err
		}
		if n := e.GetNetworkLockMethod(); int(n) < len(lockNames) {
			lock = lockNames[n]
		}
		return nil
	}, magicInventory)
	return lock, err
}
