-- A queue as lfsvc of format 1 stored it: a failed training, a waiting script. `PRAGMA user_version` is 1.
BEGIN TRANSACTION;
CREATE TABLE jobs (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            position INTEGER NOT NULL DEFAULT 0,
            state TEXT NOT NULL,
            command TEXT NOT NULL, path TEXT NOT NULL, devices TEXT NOT NULL, evaluate INTEGER NOT NULL,
            text TEXT NOT NULL, name TEXT NOT NULL,
            working_directory TEXT NOT NULL, output_dir TEXT NOT NULL,
            environment TEXT NOT NULL, umask INTEGER NOT NULL, requeue INTEGER,
            queued_at INTEGER NOT NULL, started_at INTEGER NOT NULL, finished_at INTEGER NOT NULL,
            attempt INTEGER NOT NULL, interruptions INTEGER NOT NULL, kill_requested_at INTEGER NOT NULL,
            launcher TEXT NOT NULL, instance TEXT NOT NULL, handle TEXT NOT NULL,
            exit_status INTEGER, failed_step TEXT NOT NULL, failure TEXT NOT NULL,
            steps TEXT NOT NULL, log TEXT NOT NULL, parent INTEGER NOT NULL, warnings TEXT NOT NULL
        );
INSERT INTO "jobs" VALUES(1,1,'failed','train','/lab/run.yaml','[0, 1]',1,'train:/lab/run.yaml@0,1','first','/lab','/lab/saves/run','{"A": "b"}',18,NULL,1764000000000000,1764000001000000,1764000002000000,1,0,0,'systemd','boot/1','h',1,'train','The train step ended with exit status 1.','[{"name": "train", "state": "failed", "started_at": 1764000001000000, "finished_at": 1764000002000000, "exit_status": 1, "log": "/lab/saves/run/x.log", "note": ""}]','/lab/saves/run/x.log',0,'["a warning"]');
INSERT INTO "jobs" VALUES(2,2,'queued','shell','/lab/prepare.sh','[]',0,'/lab/prepare.sh','','/lab','','{}',18,1,1764000003000000,0,0,0,0,0,'','','',NULL,'','','[]','',0,'[]');
CREATE TABLE transitions (old TEXT NOT NULL, new TEXT NOT NULL, UNIQUE (old, new));
INSERT INTO "transitions" VALUES('queued','cancelled');
INSERT INTO "transitions" VALUES('queued','running');
INSERT INTO "transitions" VALUES('running','failed');
INSERT INTO "transitions" VALUES('running','interrupted');
INSERT INTO "transitions" VALUES('running','queued');
INSERT INTO "transitions" VALUES('running','killed');
INSERT INTO "transitions" VALUES('running','succeeded');
CREATE INDEX jobs_queue ON jobs (position) WHERE state = 'queued';
CREATE INDEX jobs_state ON jobs (state, id);
CREATE TRIGGER legal_change BEFORE UPDATE OF state ON jobs
        WHEN OLD.state <> NEW.state
            AND NOT EXISTS (SELECT 1 FROM transitions WHERE old = OLD.state AND new = NEW.state)
        BEGIN SELECT RAISE(ABORT, 'illegal change of state'); END;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('jobs',2);
COMMIT;
PRAGMA user_version = 1;
